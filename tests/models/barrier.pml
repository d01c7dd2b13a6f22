/*
 * The barrier of a group's epoch (DESIGN §6, coordinator/model/epoch.py, coordinator/ledger/scripts/epochs), for spin.
 *
 * Every machine has a host of its own here, with an agent and what the host's guard does for it: agents of several machines
 * that die together are agents that die one right after the other. Every `atomic` is one script of the ledger, one command
 * to a guest with its answer, or one entry of a host's journal; between two of them anybody else may act. Who sleeps or is
 * late is not chosen for a while. A host's clock is not the ledger's: its guard may act at any moment after the entry in
 * the journal, before the deadline as well as long after it.
 *
 * Asserted, and that everybody comes to an end:
 *   - when all have ended or were killed, no machine that we stopped stands still, and one that its user had paused does
 *   - nobody is stopped before all have prepared; if an agent does not wait, what it did does not count
 *   - the go key becomes GO only before the deadline, when all are stopped, and never GO and ABORT
 *   - no participant acts on GO while another acts on ABORT
 *   - of an epoch that is TAKEN: at one moment all machines stood still, none of which ran between its freeze and its cut
 *
 * What comes after TAKEN concerns no guest that stands still, and is not in here.
 *
 * test_models.py has the scenarios and the mutations (#ifdef), of which each has to be found out.
 */

/* What there is in a scenario. */
#ifndef VMS
#define VMS 2
#endif
#ifndef KILLS /* how often an agent is killed; it may be started again */
#define KILLS 0
#endif
#ifndef PAUSED /* machines that their users had paused, a bit each */
#define PAUSED 0
#endif
#ifndef RESUMES /* 1: once, a user resumes a machine */
#define RESUMES 0
#endif
#ifndef LOSSES /* 1: once, the ledger's server is restarted and has lost what came last */
#define LOSSES 0
#endif
#ifndef REPEATS /* 0: no answer to an arrival is lost */
#define REPEATS 1
#endif
#ifndef IMPATIENT /* machines whose agents may freeze them before they are told to */
#define IMPATIENT 0
#endif

#define ALL ((1 << VMS) - 1)

/* The ledger: epoch:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*. The arrivals are a bit a machine. */
#define PREPARING 0
#define FREEZING 1
#define CUTTING 2
#define TAKEN 3
#define ABORTED 4
#define OPEN 0
#define GO 1
#define ABORT 2
byte phase = PREPARING, key = OPEN, prepared, frozen, cuts;
bool prepare_over, freeze_over; /* what its clock says */
#if defined(FROZEN_COUNTED) || defined(CUTS_COUNTED)
byte count;
#endif

/* The hosts, a bit a machine. */
byte running = ALL & ~PAUSED;
byte journal;                   /* frozen by us: the guard's and a restarted agent's list */
byte ran;                       /* a RESUME in the event stream since the freeze */
byte agents = VMS, kills = KILLS;
#ifdef GUARD_ACTS_ONCE
byte acted;
#endif

/* What nobody stores. */
byte ready, stopped;            /* machines that have prepared, that were stopped */
byte still;                     /* that stand still since their freeze, without a cut yet */
bool met;                       /* once, all of them did */
byte well_cut;                  /* that were cut while they did */
byte resumed;                   /* by a user */
bool went, ended;               /* the key was GO, was ABORT */
bool acted_go, acted_abort;     /* a participant acted on it */

/* A server that forgets may tell one GO and another ABORT; then not all arrive CUT. */
#define check_key() assert(LOSSES || (!(went && ended) && !(acted_go && acted_abort)))

/* -- the ledger's scripts; `me` is the machine, `seen` gets the answer ------------------------------------------- */

inline abort_epoch() {
    phase = ABORTED;
    if
#ifdef ABORT_OVER_GO
    :: key = ABORT
#else
    :: key == OPEN -> key = ABORT
    :: else
#endif
    fi;
    ended = ended | (key == ABORT);
    check_key()
}

/* time_out in scripts/epochs/prelude.lua: the deadline is looked at by every arrival and by whoever has waited */
inline look_at_clock() {
    if
    :: (phase == PREPARING && prepare_over) || (phase == FREEZING && freeze_over) -> abort_epoch()
    :: else
    fi
}

inline arrive_prepared() {
    ready = ready | me;
    if
    :: !(prepared & me) ->
        look_at_clock();
        if
        :: phase == PREPARING ->
            prepared = prepared | me;
            if
            :: prepared == ALL -> phase = FREEZING
            :: else
            fi
        :: else
        fi
    :: else
    fi
}

#define EARLY 9
#ifdef FROZEN_COUNTED
#define COUNTED_BEFORE 0
#define ALL_FROZEN (count == VMS)
#else
#define COUNTED_BEFORE (frozen & me)
#define ALL_FROZEN (frozen == ALL)
#endif
#if defined(EARLY_COUNTS)
#define FROZEN_COUNTS (phase == FREEZING || phase == PREPARING)
#elif defined(GO_OVER_ABORT)
#define FROZEN_COUNTS (phase == FREEZING || phase == ABORTED)
#else
#define FROZEN_COUNTS (phase == FREEZING)
#endif

inline arrive_frozen() {
    seen = 0;
    if
    :: COUNTED_BEFORE
    :: else ->
#ifndef DEADLINE_IGNORED
        look_at_clock();
#endif
        if
        :: FROZEN_COUNTS ->
            assert(ready == ALL);
            frozen = frozen | me;
#ifdef FROZEN_COUNTED
            count++;
#endif
            if
            :: ALL_FROZEN ->
                phase = CUTTING; key = GO; went = true;
                assert(!freeze_over && stopped == ALL);
                check_key()
            :: else
            fi
        :: !(FROZEN_COUNTS) && phase == PREPARING -> seen = EARLY
        :: else
        fi
    fi
}

#ifdef CUTS_COUNTED
#define ALL_CUT (count == VMS)
#else
#define ALL_CUT (cuts == ALL)
#endif

inline arrive_cut() {
    if
    :: phase == CUTTING ->
        cuts = cuts | me;
#ifdef CUTS_COUNTED
        count++;
#endif
        if
        :: ALL_CUT -> phase = TAKEN; assert(met && well_cut == ALL)
        :: else
        fi
    :: else
    fi
}

inline fail_cut() {
    if
    :: phase == CUTTING -> abort_epoch()
    :: else
    fi
}

inline abort_before_go() {
    if
    :: key == OPEN -> abort_epoch()
    :: else
    fi
}

/* -- a host's commands to its guest ------------------------------------------------------------------------------- */

inline stand_still() {
    ran = ran & ~me;
    stopped = stopped | me;
    still = still | me;
    met = met | (still == ALL);
    assert(ready == ALL || (IMPATIENT & me))
}

/* What is asked right before the guest is let run, and the event stream up to it. Its views were taken before it arrived,
   and hold what it held then for as long as it stands still. */
inline end_cut() {
    well_cut = well_cut | (still & me);
    still = still & ~me;
#if defined(NO_PROOF)
    proven = true
#elif defined(PROOF_BEFORE_CUT)
    skip
#else
    proven = !(ran & me)
#endif
}

inline cont(vm) { running = running | (vm); ran = ran | (vm); still = still & ~(vm) }

/* One step of an agent, before which it may be killed. Without the `true` an `else` at its beginning would be the else of
   all that is possible here, the killing too. */
#define STEP(what) if :: atomic { true; what } :: atomic { kills > 0 -> kills--; goto killed } fi

/* The answer was lost. */
#if REPEATS
#define AGAIN(what) if :: true :: STEP(what) fi
#else
#define AGAIN(what) skip
#endif

#ifdef UNJOURNAL_FIRST
#define THAW STEP(journal = journal & ~me); STEP(cont(me))
#else
#define THAW STEP(cont(me)); STEP(journal = journal & ~me)
#endif

proctype Agent(byte me) {
    byte seen;
    bool ours, proven;

    STEP(arrive_prepared());
    AGAIN(arrive_prepared());
    do
    :: atomic { phase != PREPARING -> seen = (phase == ABORTED -> ABORT : OPEN); break }
    :: atomic { phase == PREPARING && prepare_over -> look_at_clock() }
    :: atomic { kills > 0 -> kills--; goto killed }
#ifdef FREEZE_UNASKED
    :: phase == PREPARING -> break
#else
    :: phase == PREPARING && (IMPATIENT & me) -> break
#endif
    od;
    if
    :: seen == ABORT -> goto act
    :: else
    fi;

    /* Freeze. */
    if
    :: atomic { !(running & me) -> stand_still() }
    :: running & me ->
        ours = true;
#ifndef STOP_BEFORE_JOURNAL
        STEP(journal = journal | me);
#endif
        STEP(running = running & ~me; stand_still())
#ifdef STOP_BEFORE_JOURNAL
        ; STEP(journal = journal | me)
#endif
    fi;
    STEP(arrive_frozen());
    AGAIN(arrive_frozen());
#ifdef CUT_UNASKED
    seen = GO;
#else
    do
    :: seen == EARLY -> break
    :: atomic { seen != EARLY && key != OPEN -> seen = key; break }
    :: atomic { seen != EARLY && key == OPEN && (prepare_over || freeze_over) -> look_at_clock() }
    :: atomic { kills > 0 -> kills--; goto killed }
#ifdef OWN_TIMEOUT
    :: key == OPEN -> seen = ABORT; break
#endif
    od;
#endif

act:
    acted_go = acted_go | (seen == GO);
    acted_abort = acted_abort | (seen == ABORT);
    check_key();
    if
    :: seen == GO ->
        assert(LOSSES || key == GO);
#ifdef PROOF_BEFORE_CUT
        STEP(proven = !(ran & me));
#endif
        STEP(end_cut())
    :: else
    fi;
#ifdef THAW_ALL
    ours = true;
#endif
    if
    :: ours -> THAW
    :: else
    fi;
    if
    :: seen == GO && proven ->
        STEP(arrive_cut());
        AGAIN(arrive_cut())
    :: seen == GO -> STEP(fail_cut()) /* also for a reason of its own */
    :: seen == EARLY -> STEP(abort_before_go())
    :: seen == ABORT
    fi;
    goto gone;

killed:
    if
    :: true -> goto gone
    :: true -> seen = 0; ours = false; proven = false /* started again */
    fi;
    if
    :: journal & me ->
        atomic { cont(me) }
        atomic { journal = journal & ~me }
    :: else
    fi;
    atomic { abort_before_go() }
    atomic {
        if
        :: !(cuts & me) -> fail_cut()
        :: else
        fi
    }
gone:
    /* What nobody will look at is forgotten, for fewer states. */
    atomic { agents--; seen = 0; ours = false; proven = false; ran = ran & ~me }
}

#ifndef NO_GUARD
/* It looks again and again: an agent that wakes up after the deadline may stop a machine only then. */
#ifdef GUARD_ACTS_ONCE
#define THAWS(vm) atomic { journal & ~acted & (vm) -> acted = acted | (vm); cont(vm) }
#else
#define THAWS(vm) atomic { journal & ~running & (vm) -> cont(vm) }
#endif
proctype Guard() {
    do
    :: THAWS(1)
    :: THAWS(2)
#if VMS > 2
    :: THAWS(4)
#endif
    :: atomic { agents == 0 && !(journal & ~running) -> break }
#ifdef GUARD_ACTS_ONCE
    :: atomic { agents == 0 && !(journal & ~acted) -> break }
#endif
    od
}
#endif

proctype Clock() {
    do
    :: phase == PREPARING && !prepare_over -> prepare_over = true
    :: phase == FREEZING && !freeze_over -> freeze_over = true
    :: agents == 0 -> break
    od
}

/* A coordinator that died does nothing; one that lives, or the next one, may give the epoch up whenever it likes. */
proctype Coordinator() {
    if
    :: true
    :: atomic { phase != ABORTED -> abort_epoch() }
    fi
}

#if RESUMES
proctype User() {
    if
    :: true
    :: atomic { ~running & 1 -> cont(1); resumed = 1 }
    :: atomic { ~running & 2 -> cont(2); resumed = 2 }
    fi
}
#endif

#if LOSSES
proctype Restart() {
    byte phase_, key_, prepared_, frozen_, cuts_;
    atomic { phase_ = phase; key_ = key; prepared_ = prepared; frozen_ = frozen; cuts_ = cuts }
    atomic { phase = phase_; key = key_; prepared = prepared_; frozen = frozen_; cuts = cuts_ }
}
#endif

init {
    atomic {
        run Agent(1);
        run Agent(2);
#if VMS > 2
        run Agent(4);
#endif
#ifndef NO_GUARD
        run Guard();
#endif
#if RESUMES
        run User();
#endif
#if LOSSES
        run Restart();
#endif
        run Coordinator();
        run Clock()
    }
    _nr_pr == 1 -> /* all have ended or were killed */
    assert((running & (ALL & ~PAUSED)) == (ALL & ~PAUSED));
    assert((running & PAUSED) == (resumed & PAUSED))
}
