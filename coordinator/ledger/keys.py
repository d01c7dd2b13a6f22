"""Every key of the ledger in Redis, composed inside the Lua scripts (scripts/prelude.lua).

All begin with the prefix, "fp:" unless configured. A cluster would demand that keys be passed to a script
and lie in one slot; the ledger is one record kept by one server (a replica may follow it), so they need not.
Times are milliseconds of the server's clock unless said otherwise. "leader" below: whoever holds the term.

==================  ======  =====================================================================  ==================
key                 type    meaning                                                                written by
==================  ======  =====================================================================  ==================
leader              hash    generation (kept for ever), nonce, until                               lead, resign
run                 string  run_id of the server's run that a leader adopted                       adopt_run, resign
hold                string  no claims before this time                                             adopt_run
job:JOB             hash    a field per field of JobRecord (spec as JSON, booleans 0 and 1),       submit, update,
                            version, _incarnation, _next_unit (of its units), _claims (copy units  all unit steps
                            claimed so far), _targets
jobs                zset    all jobs by µs of creation                                             submit, dismiss
active              set     jobs that are not concluded                                            submit, update
concluded           zset    the others by µs of their end                                          update, dismiss
targets             hash    name of a target: the active job that writes it                        reserve, update
idem:KEY            string  the job that an idempotency key created; 24 h                          submit
incarnations        string  counter: a job gets a new one when it is created or drops its units    submit, update
unit:JOB/UNIT       hash    UNIT is INCARNATION-NUMBER. kind, pass, start, end, bytes, extents,    unit steps, reap
                            remaining (extents, once some are done), counted (bytes of it in the
                            job's offset), state (ready, leased, delayed, done, quarantined),
                            token, until, worker, failures (counted attempts), expired,
                            expired_at, digest, rewrite (1: comparing it proves nothing), spoilt
                            (its lease's: see lose_flush), cause (JSON of the event it was given up
                            with). Deleted when done, unless a lease of it expired, once it is not
                            among the recent ones any more
ready:JOB           list    units to claim, first at the left                                      unit steps, reap
leased:JOB          zset    leased units: copy units by number of their claim, others at +inf      unit steps, reap
recent:JOB          zset    copy units done, all or in part, while a lease lasts that began before finish, release,
                            by how many were claimed until then                                    pruned with a lease
results:JOB         list    what units of the pass left with finish                                finish
suspects:JOB        set     done units one of whose leases expired                                 finish, redo
quarantined:JOB     set     units given up                                                         release, reap,
                                                                                                   redo, update
leases              zset    JOB/UNIT by the end of its lease                                       unit steps, reap
delayed             zset    JOB/UNIT by the end of its delay                                       release, reap
runnable            zset    jobs a unit of which may be claimed now, by turn                       all that changes it
turn                string  counter: the place in the round robin                                  as runnable
done:TOKEN          string  the unit that this token finished; 1 h                                 finish, redo
trash               list    INCARNATION:FIRST:LAST:JOB, units to be swept in batches               update, dismiss, reap
bucket:JOB          hash    token bucket: level (bytes), at (µs), speed; an hour after its use     take
wake                zset    jobs that want the control loop's attention, by µs; group:GROUP of      wake in prelude.lua
                            groups
bells:ROLE          zset    outstanding doorbells by time of ringing                               ring, woken
workers             zset    workers by the time they are taken for dead                            worker_alive, _gone
worker_facts        hash    worker: "slots role"                                                   worker_alive, _gone
repositories        hash    id of a repository: "time of the last whole scan (s) URI"              record_points,
                                                                                                   scanned
groups:REPO         set     groups with points that are remembered                                 points' scripts
points:REPO         hash    GROUP@EPOCH: a PointRecord as JSON                                     points' scripts
epochs:REPO:GROUP   zset    epochs by themselves                                                   points' scripts
recorded:REPO       zset    GROUP@EPOCH by the mark of its recording                               points' scripts
forgotten:REPO      zset    GROUP@EPOCH by the mark of its being forgotten; the last 10,000        points' scripts
told:REPO           set     GROUP@EPOCH of which there was a RECOVERY_POINT                        points' scripts
group:GROUP         hash    record (a GroupRecord as JSON), version                                put_group,
                                                                                                   remove_group
group_names         set     of all groups                                                          put_group,
                                                                                                   remove_group
mark                string  the last mark: µs, or one more than the one before                     points' scripts
epoch_numbers       hash    group: the number of its newest epoch; for ever                        epochs/open
epoch:GROUP@NUMBER  hash    a field per field of Epoch but its arrivals (spec as JSON), _hosts     scripts/epochs
                            (one a line). This and the next five: for an hour after it was over
epoch_vms:EPOCH     zset    its machines, in the order of the spec                                 epochs/open
epoch_prepared:…,   set     the machines that arrived so                                           epochs/arrive
epoch_frozen:EPOCH
epoch_cut:EPOCH     hash    machine: its CutFacts as JSON                                          epochs/arrive
epoch_readable:…    hash    machine: its ReadFacts as JSON                                         epochs/arrive
epochs_open         set     epochs that are not over                                               scripts/epochs
epochs_on:HOST      set     epochs with machines of the host that are not over                     scripts/epochs
epoch_news:HOST     stream  group, number, phase, key, why, left_ms of epochs with machines of     scripts/epochs
                            the host; about the last 1000, for an hour
events              stream  event, job, time (s), data (JSON); about the last 100,000              submit, update,
                                                                                                   dismiss, release,
                                                                                                   record_points,
                                                                                                   put_group
probe               string  written by ping, to learn whether the server takes writes; 1 s         ping
==================  ======  =====================================================================  ==================
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_PREFIX = "fp:"


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that Python reads or writes without a script."""

    prefix: str = DEFAULT_PREFIX

    @property
    def active(self) -> str:
        return f"{self.prefix}active"

    @property
    def concluded(self) -> str:
        return f"{self.prefix}concluded"

    @property
    def events(self) -> str:
        return f"{self.prefix}events"

    @property
    def jobs(self) -> str:
        return f"{self.prefix}jobs"

    @property
    def probe(self) -> str:
        return f"{self.prefix}probe"

    @property
    def wake(self) -> str:
        return f"{self.prefix}wake"

    def bells(self, role: str) -> str:
        return f"{self.prefix}bells:{role}"

    def epoch_news(self, host: str) -> str:
        return f"{self.prefix}epoch_news:{host}"

    def group(self, name: str) -> str:
        return f"{self.prefix}group:{name}"

    def job(self, job_id: str) -> str:
        return f"{self.prefix}job:{job_id}"
