/*
 * How a group's epoch is decided (DESIGN §6 and §7, coordinator/model/round.py, workers/mover/group_epochs.py,
 * workers/repository/epochs.py), with leaders that sleep, jobs that are late and a ledger that forgets, for spin.
 *
 * A group of two disks. Every `atomic` is one script of the ledger, one request to the repository with what is concluded
 * from the answer, or what a leader sees before it acts. What it does next is another, so it may sleep in between, be
 * deposed, and go on. A job's worker may sleep as well, until others have done the job again and the round is over. The
 * ledger may fall back to what it was at any moment before, or to nothing; ids of rounds are random, so none comes twice.
 *
 * Asserted:
 *   - an epoch is decided once: what is a point stays one, and what got a tombstone never is one
 *   - a point has all its disks, and all that it and the points below it lead to is there
 *   - an epoch is opened only when all before it are decided, and stands on nothing but a point
 *   - agents retire only a point; a round ends with a point only if its epoch is one
 *   - when nobody can go on, the group has no round that waits for something
 *
 * collection.pml has who may remove what in all its steps, barrier.pml what makes an epoch readable; here each is one.
 *
 * test_models.py has the scenarios and the mutations (#ifdef), of which each has to be found out.
 */

#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef TAKEOVERS /* how often another leads, because the leader sleeps */
#define TAKEOVERS 0
#endif
#ifndef WORKERS
#define WORKERS 1
#endif
#ifndef LOSSES /* 1: once, the ledger forgets what came last */
#define LOSSES 0
#endif
#ifndef RUINS /* 1: once, it forgets everything, and the group is applied again */
#define RUINS 0
#endif
#ifndef PRUNES /* how many prunes there are; each may end an epoch that it finds silent */
#define PRUNES 0
#endif
#ifndef FAILURES /* 1: any job may fail */
#define FAILURES 0
#endif

/* Epochs: a bit each; 1 is a point that is there from the first. */
#define FIRST 1
#ifndef LAST
#define LAST 16
#endif
#define TOP(some) ((some) & 16 -> 16 : ((some) & 8 -> 8 : ((some) & 4 -> 4 : ((some) & 2 -> 2 : (some) & 1))))
#define LOWEST(some) ((some) & 1 -> 1 : ((some) & 2 -> 2 : ((some) & 4 -> 4 : ((some) & 8 -> 8 : (some) & 16))))
#define INDEX(e) ((e) == 2 -> 1 : ((e) == 4 -> 2 : ((e) == 8 -> 3 : ((e) == 16 -> 4 : 0))))
#define IF(condition, value) ((condition) -> (value) : 0)

/* The repository. */
byte manifests = FIRST, tombstones; /* groups/<group>/points/<epoch>.json */
byte holds;                     /* holds/epoch-… */
byte owner[5], parent[5];       /* whose they are, and what they pin */
byte made_by[5];                /* the rounds that wrote manifests */
byte packs_a = FIRST, packs_b = FIRST; /* what was stored of the two disks, by epochs */
#define DECIDED (manifests | tombstones)

/* The ledger: the group and its round … */
#define IDLE 0
#define OPENING 1
#define STARTING 2
#define CUTTING 3
#define COPYING 4
#define PUBLISHING 5
#define ENDING 6
byte leader = 1;                /* by its nonce: who has led in between has not slept over it */
byte knows;                     /* coordinators that have looked at this run of its server */
byte stage, round, number, base, counted;
/* … its jobs, by what they are … */
#define OPEN 1
#define COPY_A 2
#define COPY_B 4
#define PUBLISH 8
#define ABANDON 16
#define COPIES (COPY_A | COPY_B)
byte submitted, done, failed;
byte of_copies, of_publish, of_abandon; /* the epochs that they are about */
byte members;                   /* whose copies publish is to make a point of */
byte opened, stands_on;         /* what open tells */
bool is_point;                  /* what publish or abandon tells */
/* … and its newest epoch. */
#define NONE 0
#define AT_WORK 1
#define READABLE 2
#define RETIRED 3
#define ABORTED 4
byte newest, phase;
#define IS_OVER (phase == RETIRED || phase == ABORTED)

byte claimed, unheard;          /* workers whose claims came last, and those whose claims it has lost */

/* The hosts: epochs that are staged there. */
byte staged;

/* What nobody stores. */
byte rounds, takeovers = TAKEOVERS;
byte ended;                     /* epochs that ever got a tombstone */

inline check_all() {
    assert(!(manifests & tombstones) && !(manifests & ended));
    assert(!(manifests & ~(packs_a & packs_b)))
}

/* -- jobs, done by workers: workers/mover/group_epochs.py, backup.py ----------------------------------------------- */

/* A ledger hears nobody whose claim, by its token, it knows nothing of. That it hears only the last of several is left
   out: they tell the same. */
#define IS_WANTED (round == mine && submitted & job & ~(done | failed) && !(unheard & me))
inline succeed() {
    if
    :: IS_WANTED -> done = done | job
    :: else
    fi
}
inline fail() {
    if
    :: IS_WANTED -> failed = failed | job
    :: else
    fi
}

/* Decisions.decide of a tombstone, then let_go. */
inline put_tombstone(e) {
    if
#ifdef PLAIN_TOMBSTONE
    :: true -> tombstones = tombstones | (e); ended = ended | (e); manifests = manifests & ~(e)
#else
    :: !(DECIDED & (e)) -> tombstones = tombstones | (e); ended = ended | (e)
    :: else
#endif
    fi;
    check_all()
}

proctype Worker(byte me) {
    byte job, mine, epoch, under, seen, other, at_least;
end:
    do
    :: atomic {
            submitted & ~(done | failed) ->
            if
            :: submitted & ~(done | failed) & OPEN -> job = OPEN; at_least = counted << 1
            :: submitted & ~(done | failed) & COPY_A -> job = COPY_A; epoch = of_copies
            :: submitted & ~(done | failed) & COPY_B -> job = COPY_B; epoch = of_copies
            :: submitted & ~(done | failed) & PUBLISH -> job = PUBLISH; epoch = of_publish; under = base; other = members
            :: submitted & ~(done | failed) & ABANDON -> job = ABANDON; epoch = of_abandon
            fi;
            mine = round;
            claimed = claimed | me
        }
        if
#if FAILURES
        :: atomic { true -> fail(); goto over }
#endif
        :: job == OPEN ->
            /* epochs.open_epochs */
            atomic { seen = DECIDED }
            atomic { other = holds }
#ifndef OPEN_UNDECIDED
            do
            :: atomic {
                    other & ~seen -> epoch = LOWEST(other & ~seen);
                    if
                    :: owner[INDEX(epoch)] == mine -> goto taken_up
                    :: owner[INDEX(epoch)] != mine && owner[INDEX(epoch)] == round -> fail(); goto over /* not over */
                    :: else
                    fi
                }
                atomic { put_tombstone(epoch) } /* abandon */
                atomic { holds = holds & ~epoch; other = other & ~epoch; seen = seen | epoch; epoch = 0 }
            :: atomic { other & seen -> holds = holds & ~(other & seen); other = other & ~seen }
            :: atomic { !other -> break }
            od;
#endif
            atomic {
                epoch = TOP(seen | other) << 1;
                if
                :: at_least > epoch -> epoch = at_least
                :: else
                fi;
                if
                :: epoch > LAST -> fail(); goto over /* no more in this model */
                :: else
                fi;
                seen = seen & manifests; /* those that are read are points */
                other = 0; at_least = 0
#ifdef COUNTED_IS_PARENT
                ; seen = seen | counted
#endif
            }
            atomic { /* Decisions.announce */
                if
                :: holds & epoch -> fail(); goto over
                :: else -> holds = holds | epoch; owner[INDEX(epoch)] = mine; parent[INDEX(epoch)] = TOP(seen); seen = 0
                fi
            }
            atomic { /* the holds again: `first`, then Decisions.about */
                if
#ifndef OPEN_UNDECIDED
                :: holds & (epoch - 1) -> holds = holds & ~epoch; fail(); goto over
#endif
                :: DECIDED & epoch -> holds = holds & ~epoch; fail(); goto over
                :: else
                fi
            }
taken_up:
            atomic {
                if
                :: IS_WANTED ->
                    opened = epoch;
                    stands_on = parent[INDEX(epoch)];
                    assert(stands_on & manifests);
                    assert(DECIDED & epoch || !((epoch - 1) & ~DECIDED & holds))
                :: else
                fi;
                succeed()
            }
        :: atomic {
                job & COPIES ->
                /* renew, and the host's image */
                if
                :: DECIDED & epoch || !(holds & epoch) || owner[INDEX(epoch)] != mine || !(staged & epoch) ->
                    fail(); goto over
                :: else
                fi
            }
            atomic {
                packs_a = packs_a | IF(job == COPY_A, epoch);
                packs_b = packs_b | IF(job == COPY_B, epoch);
                succeed()
            }
        :: atomic {
                job == PUBLISH ->
                /* publish: _check_hold */
                if
                :: !(DECIDED & epoch) && (!(holds & epoch) || owner[INDEX(epoch)] != mine) -> fail(); goto over
                :: else
                fi
            }
            atomic { /* Decisions.decide */
                if
#ifdef PLAIN_PUT
                :: true ->
#else
                :: !(DECIDED & epoch) ->
#endif
                    manifests = manifests | epoch;
                    made_by[INDEX(epoch)] = mine;
                    tombstones = tombstones & ~epoch;
                    assert(under & manifests && other == epoch);
                    check_all()
#ifndef PLAIN_PUT
                :: else
#endif
                fi;
                if
                :: !(manifests & epoch) || made_by[INDEX(epoch)] != mine -> fail(); goto over
                :: else
                fi
            }
            atomic {
                holds = holds & ~epoch;
                if
                :: IS_WANTED -> is_point = true
                :: else
                fi;
                succeed()
            }
        :: job == ABANDON ->
            atomic { put_tombstone(epoch) }
            atomic {
                holds = holds & ~epoch;
                if
                :: IS_WANTED -> is_point = (manifests & epoch && made_by[INDEX(epoch)] == mine)
                :: else
                fi;
                succeed()
            }
        fi;
over:
        atomic {
            claimed = claimed & ~me; unheard = unheard & ~me;
            job = 0; mine = 0; epoch = 0; under = 0; seen = 0; other = 0; at_least = 0
        }
    od
}

/* -- the leader: round.next_action, then GroupControl._do ----------------------------------------------------------- */

#define KEEP 1
#define SUBMIT 2
#define BEGIN 3
#define GIVE_UP 4
#define RETIRE 5
#define CANCEL 6
#define OVER 7
#define AT(here) (leader == me && stage == here)
#define GOING (submitted & ~(done | failed))
#define IS_OURS (newest == number)
#define LOST (!IS_OURS || phase == ABORTED)

#define keep(next) act = KEEP; what = next
#define submit(some) act = SUBMIT; what = some; read = number; read_base = of_copies
#define CAN_END (stage == ENDING && !(IS_OURS && number && !IS_OVER))
#ifdef HALF
#define SEALED (done & COPIES)
#else
#define SEALED !(COPIES & ~done)
#endif
#ifdef SEAL_RETIRES
#define PUBLISHED (submitted & PUBLISH && !(failed & PUBLISH))
#else
#define PUBLISHED (done & PUBLISH)
#endif

/* None is executable while the leader has to wait. */
inline next_action() {
    if
    :: AT(IDLE) && rounds < ROUNDS -> keep(OPENING)
    :: AT(OPENING) && !(submitted & OPEN) -> submit(OPEN)
    :: AT(OPENING) && done & OPEN -> keep(STARTING); read = opened; read_base = stands_on
    :: AT(OPENING) && failed & OPEN -> keep(ENDING)
    :: AT(STARTING) && IS_OURS -> keep(CUTTING)
    :: AT(STARTING) && newest > number -> keep(ENDING); read = newest
    :: AT(STARTING) && newest < number && newest && !IS_OVER -> act = GIVE_UP; what = newest
    :: AT(STARTING) && newest < number && (!newest || IS_OVER) -> act = BEGIN; what = number
    :: AT(CUTTING) && LOST -> keep(ENDING)
    :: AT(CUTTING) && !LOST && phase == READABLE -> keep(COPYING)
    :: AT(COPYING) && (LOST || failed & COPIES) -> keep(ENDING)
    :: AT(COPYING) && !LOST && COPIES & ~submitted -> submit(COPIES)
    :: AT(COPYING) && !LOST && !(failed & COPIES) && SEALED -> keep(PUBLISHING)
    :: AT(PUBLISHING) && !(submitted & PUBLISH) && LOST -> keep(ENDING)
    :: AT(PUBLISHING) && !(submitted & PUBLISH) && !LOST -> submit(PUBLISH)
    :: AT(PUBLISHING) && failed & PUBLISH -> keep(ENDING)
    :: AT(PUBLISHING) && PUBLISHED && IS_OURS && phase == READABLE -> act = RETIRE; what = number
    :: AT(PUBLISHING) && PUBLISHED && !(IS_OURS && phase == READABLE) -> act = OVER
    :: AT(ENDING) && !CAN_END -> act = GIVE_UP; what = number
    :: AT(ENDING) && CAN_END && GOING & ~ABANDON -> act = CANCEL
    :: AT(ENDING) && CAN_END && !(GOING & ~ABANDON) && number && !(submitted & ABANDON) -> submit(ABANDON)
    :: AT(ENDING) && CAN_END && !(GOING & ~ABANDON) && (!number || (done | failed) & ABANDON) -> act = OVER
    fi;
    was_round = round; was_stage = stage;
    knows = knows | me
}

/* put_group.lua: of the version that was read, or not at all. A stage is never come back to. */
#define IS_UNCHANGED (round == was_round && stage == was_stage)

inline forget_jobs() {
    submitted = 0; done = 0; failed = 0; of_copies = 0; of_publish = 0; of_abandon = 0; members = 0;
    opened = 0; stands_on = 0; is_point = false
}
inline do_it() {
    if
    :: act == KEEP && IS_UNCHANGED ->
        if
        :: what == OPENING -> rounds++; round = rounds
        :: what == STARTING ->
            number = read; base = read_base;
            counted = (read > counted -> read : counted)
        :: what == ENDING && read > counted -> counted = read
        :: else
        fi;
        stage = what
    :: act == SUBMIT && round == was_round ->
        if
        :: what & ~submitted & COPIES -> of_copies = read
        :: what & ~submitted & PUBLISH -> of_publish = read; members = read_base
        :: what & ~submitted & ABANDON -> of_abandon = read
        :: else
        fi;
        submitted = submitted | what
    :: act == BEGIN && (!newest || IS_OVER) -> /* epochs/open.lua */
        newest = (what > newest -> what : newest << 1);
        phase = AT_WORK
    :: act == GIVE_UP && newest == what && phase != RETIRED -> phase = ABORTED
    :: act == RETIRE && newest == what && phase == READABLE ->
        phase = RETIRED;
        assert(manifests & newest)
    :: act == CANCEL && round == was_round -> failed = failed | GOING & ~ABANDON
    :: act == OVER && IS_UNCHANGED ->
        assert(!is_point || manifests & number);
        assert(!(manifests & number) || !(number & ~(packs_a & packs_b)));
        round = 0; stage = IDLE; number = 0; base = 0; forget_jobs()
    :: else
    fi
}

/* What was read before the ledger's server was started again is worth nothing, for it may be lost. So every step of a
   leader is refused until the server's run is adopted (deposed in prelude.lua). With the term alone, which an older
   ledger knows, too, a leader that is stopped between its look and its action retires an epoch that is being cut, and
   waits for it for ever; or adds a job of the round's lost epoch, in which the round finds the decision of its next
   one. */
#ifdef RUN_NOT_FENCED
#define MAY_ACT (leader == me)
#else
#define MAY_ACT (leader == me && knows & me)
#endif

proctype Coordinator(byte me) {
    byte act, what, was_round, was_stage, read, read_base;
end:
    do
    :: atomic { next_action() }
        atomic {
            if
            :: MAY_ACT -> do_it()
            :: else /* deposed */
            fi;
            knows = knows & ~me; act = 0; what = 0; was_round = 0; was_stage = 0; read = 0; read_base = 0
        }
    :: atomic { !leader -> leader = me }
    :: atomic { leader && leader != me && takeovers > 0 -> takeovers--; leader = me }
    od
}

/* -- everybody else -------------------------------------------------------------------------------------------------- */

/* The agents of all hosts. */
active proctype Agents() {
end:
    do
    :: atomic { phase == AT_WORK -> staged = staged | newest; phase = READABLE }
    :: atomic { phase == AT_WORK -> phase = ABORTED }
    :: atomic { staged & ~IF(!IS_OVER, newest) -> staged = staged & IF(!IS_OVER, newest) }
    od
}

/* A prune, of which only what it does to epochs matters here: one that is silent is ended, what nothing leads to goes. */
proctype Prune() {
    byte silent, gone;
    atomic { silent = LOWEST(holds & ~DECIDED) }
    if
    :: silent ->
#ifndef NO_TOMBSTONE
        atomic { put_tombstone(silent) }
#endif
        atomic { holds = holds & ~silent }
    :: true
    fi;
    atomic {
#if defined(COLLECT_UNDECIDED)
        gone = ~manifests
#elif defined(NO_TOMBSTONE)
        gone = ~manifests & (DECIDED | ~holds)
#else
        gone = ~manifests & DECIDED
#endif
    }
    atomic {
        packs_a = packs_a & ~gone;
        packs_b = packs_b & ~gone;
        check_all();
        silent = 0; gone = 0
    }
}

#if LOSSES
/* Redis is started again, or another takes its place: what came last is lost. */
active proctype Loss() {
    byte leader_, stage_, round_, number_, base_, counted_, submitted_, done_, failed_;
    byte of_copies_, of_publish_, of_abandon_, members_, opened_, stands_, newest_, phase_;
    bool point_;
    atomic {
        leader_ = leader; stage_ = stage; round_ = round; number_ = number; base_ = base; counted_ = counted;
        submitted_ = submitted; done_ = done; failed_ = failed; of_copies_ = of_copies;
        of_publish_ = of_publish; of_abandon_ = of_abandon; members_ = members; opened_ = opened; stands_ = stands_on;
        newest_ = newest; phase_ = phase; point_ = is_point;
        claimed = 0
    }
    atomic {
        unheard = unheard | claimed; knows = 0;
        leader = leader_; stage = stage_; round = round_; number = number_; base = base_; counted = counted_;
        submitted = submitted_; done = done_; failed = failed_; of_copies = of_copies_;
        of_publish = of_publish_; of_abandon = of_abandon_; members = members_; opened = opened_; stands_on = stands_;
        newest = newest_; phase = phase_; is_point = point_;
        leader_ = 0; stage_ = 0; round_ = 0; number_ = 0; base_ = 0; counted_ = 0; submitted_ = 0; done_ = 0;
        failed_ = 0; of_copies_ = 0; of_publish_ = 0; of_abandon_ = 0; members_ = 0; opened_ = 0; stands_ = 0;
        newest_ = 0; phase_ = 0; point_ = 0
    }
}
#endif

#if RUINS
active proctype Ruin() {
    atomic {
        leader = 0; knows = 0; stage = IDLE; round = 0; number = 0; base = 0; counted = 0; newest = 0; phase = NONE;
        forget_jobs()
    }
}
#endif

active proctype Stuck() {
end:
    timeout -> assert(stage == IDLE)
}

init {
    atomic {
        made_by[0] = 0;
        run Worker(1);
#if WORKERS > 1
        run Worker(2);
#endif
#if PRUNES
        run Prune();
#endif
#if PRUNES > 1
        run Prune();
#endif
#if TAKEOVERS
        run Coordinator(2);
#endif
        run Coordinator(1)
    }
}
