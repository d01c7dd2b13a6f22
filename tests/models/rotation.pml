/*
 * Which bitmaps of a disk tell what was written (coordinator/model/bitmap.py, and how workers/agent goes by it), for
 * spin.
 *
 * One disk of one machine: disks of a group share nothing but that their epoch is published or not. Blocks share nothing
 * at all, so that two are more than enough. An epoch is a bit, and so is the bitmap that is called after it; a block has
 * a byte of the bitmaps that name it. Every `atomic` is one command to QEMU, or one look at what it tells; the stop of
 * the guest and all that is done in it are one, the cut, since barrier.pml has what comes between.
 *
 * The guest writes whenever it likes. QEMU is ended in peace or killed, somebody disables bitmaps that he does not know,
 * agents are late and are killed, and whatever nobody hears of is not told: that an epoch is retired as well as that it
 * was published. What it builds on is any point, for the newest may be damaged, or just be published while somebody
 * looks, or none.
 *
 * Asserted of every point: what differs between the disk at its cut and its parent was named by the bitmaps of which the
 * copy was made, or the copy was made of the whole disk (I2).
 *
 * Not in here: somebody who enables a bitmap again that he has disabled, clears one, or removes one of several. Nothing
 * that QEMU tells would show it.
 *
 * test_models.py has the scenarios and the mutations (#ifdef), of which each has to be found out.
 */

#ifndef EPOCHS
#define EPOCHS 4
#endif
#ifndef BLOCKS
#define BLOCKS 1
#endif
#ifndef KEEPS /* 0: the image is a raw one, and QEMU's end is the end of its bitmaps */
#define KEEPS 1
#endif
#ifndef OLDER /* 0: what an epoch builds on is the newest point, always */
#define OLDER 1
#endif
#ifndef ENDS /* 1: QEMU is ended in peace, or killed */
#define ENDS 1
#endif

#define END (1 << EPOCHS)

/* QEMU: the disk's bitmaps. Those that are not usable are inconsistent; those that are stored are in the image, too. */
byte there, recording, usable, stored;
byte dirty[BLOCKS];
byte connected;                 /* epochs that have looked at this QEMU, and not at one before it */
bool tidy_is_connected;

/* The agent: the machine's epochs that have looked at the bitmaps, and have neither rotated them nor given up yet. */
byte prepared;
byte retired;                   /* points whose news have not come yet */

/* The repository and the ledger: epoch `now` is the one that may become a point. */
byte points, now = 1;
bool is_begun;                  /* the machine has heard of it */

/* What nobody stores. */
byte cuts;                      /* of points, and of what may become one */
byte since[BLOCKS];             /* those of them since which the block was written */

#define TOP(some) ((some) & 16 -> 16 : ((some) & 8 -> 8 : ((some) & 4 -> 4 : ((some) & 2 -> 2 : (some) & 1))))
#define LOWEST(some) ((some) & 1 -> 1 : ((some) & 2 -> 2 : ((some) & 4 -> 4 : ((some) & 8 -> 8 : (some) & 16))))

/* What happens to every block. */
#if BLOCKS > 1
#define EACH(what) what(0); what(1)
#else
#define EACH(what) what(0)
#endif

#define clean(b) dirty[b] = dirty[b] & there
inline forget(some) {
    there = there & ~(some);
    recording = recording & there;
    usable = usable & there;
    stored = stored & there;
    EACH(clean)
}

/* -- what bitmap.rotate concludes ---------------------------------------------------------------------------------- */

#ifdef GAPS_TRUSTED
#define RECORDED true
#else
#define RECORDED (TOP(changed) & recording)
#endif
/* Without it the model holds, too: one that is inconsistent does not record, and what a compare finds is removed. */
#define USABLE !(changed & ~usable)
#ifdef OTHERS_TRUSTED
#define IS_PARENTS changed
#else
#define IS_PARENTS (changed & parent)
#endif
#if defined(NONE_REMOVED)
#define BROKEN 0
#elif defined(ONLY_PARENTS_REMOVED)
#define BROKEN (there & parent)
#else
#define BROKEN there
#endif

inline rotate() {
    changed = there & ~(parent - 1);
    if
    :: parent && IS_PARENTS && USABLE && RECORDED -> remove = 0
    :: else -> changed = 0; remove = BROKEN
    fi;
    disable = recording & ~remove;
#ifdef NEWEST_ONLY
    changed = TOP(changed)
#endif
}

/* -- Machine.take_part, which has the machine's turn (Vm.turn), and stage_all --------------------------------------- */

#define lacks(b) lacking = lacking | (changed && since[b] & parent && !(dirty[b] & changed))
#define begin_anew(b) since[b] = since[b] & ~me
#define next_epoch() now = now << 1; is_begun = false

/* Whatever fails is told to the ledger, and the coordinator hears of it, or has given the epoch up already. */
proctype Machine() {
    byte me, parent, changed, remove, disable;
    bool lacking;
end:
    do
#ifdef TWO_AT_ONCE
    :: atomic { now < END && !is_begun ->
#else
    :: atomic { now < END && !is_begun && !prepared ->
#endif
            is_begun = true;
            me = now;
            if /* _newest_with, _is_whole */
#if OLDER
            :: points & 1 -> parent = 1
            :: points & 2 -> parent = 2
            :: points & 4 -> parent = 4
            :: points & 8 -> parent = 8
            :: true -> parent = 0
#else
            :: true -> parent = TOP(points)
#endif
            fi;
            /* _prepare */
            connected = connected | me;
            prepared = prepared | me;
            rotate()
        }
        if
        :: atomic { true -> goto over }
        :: atomic { /* Vm.take: who has heard GO does it, whatever has become of the epoch meanwhile */
                connected & me && !((disable | remove) & ~there) ->
                prepared = prepared & ~me;
                if
                :: now == me -> cuts = cuts | me
                :: else
                fi;
                EACH(lacks); /* nothing changes what does not record any more */
                EACH(begin_anew);
                recording = recording & ~disable;
                forget(there & remove);
                there = there | me;
                recording = recording | me;
                usable = usable | me;
                parent = 0; remove = 0; disable = 0
            }
        fi;
        if
        :: atomic { now != me -> goto over }
        :: atomic { !(connected & me) || changed & ~there -> goto over }
        :: atomic { /* staged while the guest goes on; published at once, since what is decided touches no bitmap */
                now == me && connected & me && !(changed & ~there) ->
                assert(!lacking);
                points = points | me;
                if
                :: true -> retired = retired | me
                :: true
                fi;
                next_epoch();
                goto over
            }
        fi;
over:
        atomic { /* what nobody looks at any more is forgotten, for fewer states */
            prepared = prepared & ~me;
            connected = connected & ~me;
            me = 0; parent = 0; changed = 0; remove = 0; disable = 0; lacking = false
        }
    od
}

/* Agent._remove_bitmaps: whenever the news of a point come, or never. */
proctype Tidy() {
    byte some, one;
end:
    do
    :: atomic {
            retired ->
            if
            :: retired & 1 -> one = 1
            :: retired & 2 -> one = 2
            :: retired & 4 -> one = 4
            :: retired & 8 -> one = 8
            :: retired & 16 -> one = 16
            fi;
            retired = retired & ~one;
#ifdef NEWER_REMOVED
            some = there & ~one;
#else
            some = there & (one - 1);
#endif
            one = 0;
            tidy_is_connected = true
        }
        do
        :: atomic {
                some ->
#ifdef NEWEST_REMOVED_FIRST
                one = TOP(some);
#else
                one = LOWEST(some);
#endif
                if
                :: tidy_is_connected && there & one -> forget(one); some = some & ~one
                :: else -> some = 0 /* an error ends it */
                fi;
                one = 0
            }
        :: atomic { some -> some = 0 /* killed */ }
        :: atomic { !some -> tidy_is_connected = false; break }
        od
    od
}

/* Gives up whatever it likes, also of what the machine has not heard yet. */
#define give_up(b) since[b] = since[b] & cuts
active proctype Coordinator() {
end:
    do
    :: atomic { now < END -> cuts = cuts & ~now; EACH(give_up); next_epoch() }
    od
}

#define written(b) atomic { since[b] = cuts; dirty[b] = dirty[b] | recording }
active proctype Guest() {
end:
    do
    :: written(0)
#if BLOCKS > 1
    :: written(1)
#endif
    od
}

#if ENDS
#define unknown(b) dirty[b] = 0
active proctype Qemu() {
end:
    do
    :: atomic { /* ended in peace, and started again */
#if KEEPS
            stored = there;
#else
            forget(there);
#endif
            connected = 0;
            tidy_is_connected = false
        }
    :: atomic { /* killed: what it had begun is not in the image, and what it had opened there is not closed */
            forget(there & ~stored);
            recording = 0;
            usable = 0;
            EACH(unknown);
            connected = 0;
            tidy_is_connected = false
        }
    od
}
#endif

/* What is looked at while a machine prepares is believed when it is cut, for the cut looks once more (_refuse_changed
   in cut.py). Without that a bitmap that somebody disables in between is taken for one that has recorded all the time. */
active proctype Somebody() {
end:
    do
#ifdef DISABLED_IN_BETWEEN
    :: atomic { recording -> recording = 0 }
#else
    :: atomic { recording && !prepared -> recording = 0 }
#endif
    od
}

init {
    atomic {
        run Tidy();
#ifdef TWO_AT_ONCE
        run Machine();
#endif
        run Machine()
    }
}
