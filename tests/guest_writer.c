/* Runs inside a test's guest and writes its disks around the page cache, for ever.
 *
 *     writer DISK...                   a process a disk writes blocks at random places of its first half
 *     writer wander DISK...            the same, but slowly, and at no place twice before it was at all of them: what is
 *                                      lost between two cuts is not written once more before anybody looks; tells how
 *                                      long writes took
 *     writer stroll DISK...            the same, ten times as slowly
 *     writer lead PORT DISK            writes 1, tells the other guest, waits for its answer, writes 2 ...
 *     writer follow PORT DISK          writes what it is told, and answers
 *
 * Every block holds a number over and over, so that one which is half old and half new shows. Who leads and who follows
 * have each written n, durably, before they say so: at every instant the follower is where the leader is or one behind.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096 };

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int opened(const char *disk, uint64_t **block)
{
    int fd = open(disk, O_RDWR | O_DIRECT);

    if (fd < 0)
        die(disk);
    if (posix_memalign((void **)block, BLOCK, BLOCK))
        die("memory");
    return fd;
}

static void write_block(int fd, uint64_t *block, uint64_t number, off_t where)
{
    for (int i = 0; i < BLOCK / 8; i++)
        block[i] = number;
    if (pwrite(fd, block, BLOCK, where) != BLOCK)
        die("write");
}

static void write_for_ever(const char *path, uint64_t disk)
{
    uint64_t *block, dice = 88172645463325252u + disk, number;
    int fd = opened(path, &block);
    off_t blocks = lseek(fd, 0, SEEK_END) / BLOCK / 2;

    for (number = 1;; number++) {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        write_block(fd, block, disk << 48 | number, dice % blocks * BLOCK);
        if (number % 64 == 0 && fdatasync(fd))
            die("sync");
        if (number % 8 == 0)
            usleep(2000); /* the host has other things to do, too */
        if (number % 256 == 0) {
            printf("wrote %llu of %llu\n", (unsigned long long)number, (unsigned long long)disk);
            fflush(stdout);
        }
    }
}

static void say(int port, uint64_t number)
{
    if (write(port, &number, sizeof number) != sizeof number)
        die("say");
}

static uint64_t hear(int port)
{
    uint64_t number;

    for (size_t got = 0; got < sizeof number;) {
        ssize_t some = read(port, (char *)&number + got, sizeof number - got);
        if (some < 0)
            die("hear");
        if (some == 0)
            usleep(1000); /* the other guest has not opened its end yet */
        got += some;
    }
    return number;
}

static void take_turns(int leads, const char *port_path, const char *disk)
{
    uint64_t *block, number;
    int fd = opened(disk, &block), port = open(port_path, O_RDWR);
    off_t blocks = lseek(fd, 0, SEEK_END) / BLOCK;

    if (port < 0)
        die(port_path);
    for (number = 1;; number++) {
        if (!leads && hear(port) != number)
            die("out of turn");
        write_block(fd, block, number, number % (blocks - 1) * BLOCK + BLOCK);
        write_block(fd, block, number, 0);
        if (fdatasync(fd))
            die("sync");
        say(port, number);
        if (leads && hear(port) != number)
            die("out of turn");
        if (leads)
            usleep(3000); /* the host has other things to do, too */
        if (number % 16 == 0) {
            printf("wrote %llu of 1\n", (unsigned long long)number);
            fflush(stdout);
        }
    }
}

static uint64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ull + now.tv_nsec / 1000;
}

static unsigned pause_us = 2000;

static void wander(const char *path, uint64_t disk)
{
    enum { STRIDE = 65536, PRIME = 7919, TOLD = 64 };
    uint64_t *block, number, took = 0, begun;
    int fd = opened(path, &block);
    off_t places = lseek(fd, 0, SEEK_END) / STRIDE;

    for (number = 1;; number++) {
        begun = now_us();
        write_block(fd, block, disk << 48 | number, number * PRIME % places * STRIDE);
        took += now_us() - begun;
        usleep(pause_us);
        if (number % 8 == 0 && fdatasync(fd))
            die("sync");
        if (number % TOLD == 0) {
            printf("wrote %llu of %llu, %llu us a write\n", (unsigned long long)number, (unsigned long long)disk,
                   (unsigned long long)(took / TOLD));
            fflush(stdout);
            took = 0;
        }
    }
}

int main(int count, char **words)
{
    void (*work)(const char *, uint64_t) = write_for_ever;
    int first = 1;

    if (count == 4 && (!strcmp(words[1], "lead") || !strcmp(words[1], "follow")))
        take_turns(words[1][0] == 'l', words[2], words[3]);
    if (count > 2 && (!strcmp(words[1], "wander") || !strcmp(words[1], "stroll"))) {
        pause_us *= words[1][0] == 's' ? 10 : 1;
        work = wander;
        first = 2;
    }
    for (int disk = first; disk < count; disk++)
        if (fork() == 0)
            work(words[disk], disk);
    wait(NULL); /* whoever ends has met an error */
    puts("a write failed");
    fflush(stdout);
    return 1;
}
