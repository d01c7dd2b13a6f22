/*
 * The pivot of a group (workers/agent/{pivot,moves,guard,held,cut}.py, coordinator/model/{complete,epoch,round}.py),
 * for spin: two machines go on with targets that passes have filled, and not a write is lost, whoever is late or dies.
 *
 * Every machine has a host of its own, with an agent and a guard. Every `atomic` is one script of the ledger, one write
 * to a guest's monitor with what QEMU makes of it, or one entry of a host's journal; between two of them anybody else
 * may act. Who sleeps or is late is not chosen for a while. There are STORMS epochs in which anybody may be, and
 * deadlines be over, at any moment; in those after them all works. QEMU does what it hears in the order in which it was
 * said, and refuses what comes too late: a job that was cancelled cannot be finalized, nor the other way round. A guest
 * writes all the time that it runs, but while a job of it is pending: then its writes wait until that is finalized or
 * cancelled.
 *
 * Asserted, and that everybody comes to an end:
 *   P1  no guest runs on a target that lacks one of its writes, nor on its source once it has written the target
 *   P2  no pass writes a target that a guest is attached to, or that is just being made ready for it
 *   P3  who moves does so in an epoch whose go key never says ABORT, if the ledger forgets nothing
 *   P4  at the end all guests run, and no writes wait, if an agent or a guard was left to see to it
 *   P5  once all works, the next epochs bring all machines to their targets, if one of them is there; a group that is
 *       given up has all of them on their sources
 *
 * How the barrier comes to its decision is in barrier.pml, which bitmaps tell what changed in rotation.pml: here a
 * machine has one disk, what it prepares is part of its stop, and READABLE is one with TAKEN. A user who lets a guest
 * run that stands still is left out.
 *
 * test_models.py has the scenarios and the mutations (#ifdef), of which each has to be found out.
 */

/* What there is in a scenario. */
#ifndef STORMS
#define STORMS 2
#endif
#ifndef KILLS /* how often an agent is killed */
#define KILLS 0
#endif
#ifndef LEAVES /* 1: an agent that was killed may not be started again */
#define LEAVES 0
#endif
#ifndef CRASHES /* how often a guard is killed, and another one started */
#define CRASHES 0
#endif
#ifndef FAILS /* machines whose targets may not answer, a bit each */
#define FAILS 0
#endif
/* Machines whose monitors may not answer when they are let run, a bit each. */
#ifndef SILENT
#define SILENT 0
#endif
#ifndef LOSSES /* 1: once, the ledger's server is restarted and has lost what came last */
#define LOSSES 0
#endif

#ifdef CLOSES_UNREAD
#define GUARD_ALONE /* or what it has left undone is done by the agent */
#endif

#define ALL 3

/* The ledger. Epochs are bits, the first one 1. */
#define PIVOT 0
#define PASS 1
#define OPENED 0  /* preparing, freezing */
#define CUTTING 1
#define READABLE 2
#define ABORTED 3
byte epoch, phase = ABORTED;
bool kind;
byte arrived, cuts;              /* FROZEN, or what a pass wants of a machine; CUT. A bit a machine. */
byte go, abort;                  /* epochs of which the go key says so; neither: OPEN */
byte doubtful;                   /* that another run of the server aborts */
byte restarted;                  /* while they were open */
bool awaited;                    /* the round has not come to an end by it yet */
#define IS_OPEN (!((go | abort) & epoch))

/* The guests, a bit a machine. */
byte running = ALL;
byte at;                         /* attached to the target, not the source */
byte pending;                    /* a mirror job waits for the word */
byte behind = ALL;               /* the guest has written what the target lacks */
byte ahead;                      /* the guest has written what the source lacks */
byte ran;                        /* the event stream has a RESUME since the stop */

/* The hosts, a bit a machine. */
byte journal;
byte held;                       /* the guard has the descriptor, and lets the guest run when the deadline is over */
byte told;                       /* it has */
byte back;                       /* what it says before `cont` attaches the guest to its source */
byte asked, yes, no;             /* `revert` is in its queue; its answer */
byte thanked, closed;            /* `thawed` is in its queue; the end of the connection */
byte idle = ALL;                 /* agents that take no part in anything */
byte gone;                       /* that are not started again */

byte storms = STORMS, kills = KILLS, crashes = CRASHES;
bool calm;                       /* all works */

/* What nobody stores. */
byte moved;                      /* epochs in which a machine has moved */

#define check_key() assert(LOSSES || !(moved & abort)) /* P3 */

/* -- what is said to QEMU; `me` is the machine --------------------------------------------------------------------- */

inline write() {
    if
    :: pending & me                    /* it waits */
    :: !(pending & me) && at & me ->
        assert(!(behind & me));        /* P1 */
        ahead = ahead | me
    :: !(pending & me) && !(at & me) ->
        assert(!(ahead & me));         /* P1 */
        behind = behind | me
    fi
}
inline what_was_to_be_written() {
    if
    :: running & me -> write()
    :: else
    fi
}
inline cont() {
    if
    :: running & me
    :: else -> running = running | me; ran = ran | me; write()
    fi
}
inline cancel() {
    if
    :: pending & me -> pending = pending & ~me; what_was_to_be_written()
    :: else
    fi
}
inline attach() { at = at & ~me; what_was_to_be_written() }

/* -- the ledger's scripts ------------------------------------------------------------------------------------------ */

inline abort_epoch() {
    if
    :: IS_OPEN -> abort = abort | epoch
    :: else
    fi;
    phase = ABORTED; arrived = 0; cuts = 0;
#ifndef RUN_NOT_LOOKED_AT
    doubtful = doubtful | (restarted & epoch);
#endif
    check_key()
}

/* arrive.lua, of PREPARED and FROZEN */
inline arrive() {
    if
    :: mine == epoch && phase == OPENED ->
        arrived = arrived | me;
        if
        :: arrived == ALL && kind == PIVOT -> go = go | epoch; phase = CUTTING; arrived = 0
        :: arrived == ALL && kind == PASS -> phase = READABLE; arrived = 0
        :: else
        fi
    :: else
    fi
}

/* abort.lua, then fail_cut.lua */
inline fail() {
    if
    :: mine == epoch && (phase == OPENED || phase == CUTTING) -> abort_epoch()
    :: else
    fi
}

inline arrive_cut() {
    if
    :: mine == epoch && phase == CUTTING ->
        cuts = cuts | me;
        if
        :: cuts == ALL -> phase = READABLE; cuts = 0
        :: else
        fi
    :: mine == epoch && phase == OPENED -> fail() /* too early, says a ledger that has lost GO */
    :: else
    fi
}

/* What a guard knows of its machine. */
inline drop() {
    held = held & ~me; told = told & ~me; back = back & ~me; thanked = thanked & ~me; closed = closed & ~me
}

/* -- an agent: PivotingMachine, and Machine as far as a pass concerns the target ----------------------------------- */

/* One step of an agent, before which it may be killed. Without the `true` an `else` at its beginning would be the else of
   all that is possible here, the killing too. */
#if KILLS
#define OR_KILLED :: atomic { kills > 0 && !calm -> kills--; goto killed }
#else
#define OR_KILLED
#endif
#define STEP(what) if :: atomic { true; what } OR_KILLED fi
#define STEP_WHEN(it, what) if :: atomic { it; what } OR_KILLED fi

#define HAS_HEARD (mine != epoch || !IS_OPEN)
#define SAYS_GO (go & mine)

proctype Agent(byte me) {
    byte mine;
    bool goes, has_moved;

end:
again:
    atomic {
        phase == OPENED && mine != epoch -> mine = epoch; idle = idle & ~me;
        if
        :: kind == PASS -> goto pass
        :: kind == PIVOT && at & me -> goto arrives /* it has moved before, and has nothing to stop for */
        :: else
        fi
    }

    /* Vm.arm; the guard answers only when it has done what was in its queue. */
    STEP_WHEN(
        !((held | asked) & me),
        assert(running & me); /* or it were taken for one that its user has stopped, and left so */
        yes = yes & ~me; no = no & ~me; journal = journal | me
    );
    /* Vm.freeze: the guard has it before the guest is stopped. */
    STEP(held = held | me);
    STEP(running = running & ~me; ran = ran & ~me);
    /* Vm.take, and the backup jobs of bring(): what was written until now is brought. */
    if
    :: atomic { true; behind = behind & ~(me & ~running) }
    :: atomic { !calm -> goto stay } /* the target cannot be written, or not in time */
    OR_KILLED
    fi;
    /* The mirror jobs of bring(). Of a guest that runs by now they do not know what it has written before. */
    STEP(pending = pending | me);
#ifndef NO_CONFIRM
    /* Vm.confirm: it has not run, and its deadline is not over, as it is by one clock of the host if the guard acts. */
    STEP(if :: (ran | told) & me -> goto stay :: else fi);
#endif
arrives:
    STEP(arrive());
#ifdef MOVES_UNASKED
    goes = true;
#else
    do
    :: atomic { HAS_HEARD -> goes = (SAYS_GO != 0); break }
    :: atomic { !HAS_HEARD && !calm -> abort_epoch() } /* time_out */
    :: atomic { !HAS_HEARD && !calm -> break }         /* the ledger is silent */
    OR_KILLED
    od;
#endif
    if
    :: atomic { at & me -> has_moved = goes; goes = false; goto tells }
    :: atomic { !(at & me) && goes -> goes = false }
    :: atomic { !(at & me) && !goes -> goto stay }
    fi;
    /* switch() */
    STEP(
        if
        :: pending & me ->
            pending = pending & ~me; at = at | me;
            moved = moved | mine; check_key();
            what_was_to_be_written();
            has_moved = true
        :: else -> goto stay /* the guard was faster */
        fi
    );
    /* has_run(), ask() */
    if
    :: atomic { true }
    :: atomic { FAILS & me && !calm && !(ran & me) -> has_moved = false; goto go_back }
    :: atomic { !calm -> has_moved = false } /* it is cancelled */
    OR_KILLED
    fi;
    goto let_run;

go_back:
    /* _go_back(). Once the guard has said `cont` the guest runs on its target, so it is asked; one that is silent for a
       second is ended, and who is told to end meanwhile waits for that. ASKED_IN_VAIN: the guard is left alone, and may say
       `cont` between has_run() and what the agent says then. LETS_RUN_UNANSWERED: the guest runs on its target, and then
       the guard hears what is in its queue, and takes it back. */
#ifndef GOES_BACK_BY_ITSELF
    STEP(asked = asked | me);
    if
    :: atomic { yes & me -> yes = yes & ~me; goto let_run }
    :: atomic { no & me -> no = no & ~me }
#ifdef ASKED_IN_VAIN
    :: atomic { asked & me && !calm -> closed = closed | (held & me) }
#else
    :: atomic { asked & me && !calm -> drop(); asked = asked & ~me }
#endif
#ifdef LETS_RUN_UNANSWERED
    :: atomic { asked & me && !calm -> goto let_run }
#endif
    OR_KILLED
    fi;
#endif
    /* It has let it run, or has ended, and says nothing any more. */
    STEP(if :: ran & me -> goto let_run :: else fi);
    STEP(attach(); cont());
    goto let_run;

stay:
    STEP(cancel()); /* keep() */
let_run:
    if
    :: atomic { true; cont() }
    :: atomic { SILENT & held & me && !calm -> has_moved = false; goto silent }
    OR_KILLED
    fi;
    STEP(thanked = thanked | (held & ~closed & me));
    STEP(journal = journal & ~me);
tells:
    STEP(
        if
        :: has_moved -> arrive_cut()
        :: else -> fail()
        fi
    );
over:
    atomic { idle = idle | me; goes = false; has_moved = false; ran = ran & ~me }
    goto again;

silent:
    /* Agent._let_go(): monitor and guard are given back; _see_it_run() connects anew once the guard has, too. */
    STEP(closed = closed | (held & me));
#ifndef GUARD_ALONE
    STEP_WHEN(!((held | asked) & me), cancel(); cont());
    STEP(journal = journal & ~me);
#endif
    goto tells;

pass:
    /* Machine._prepare */
    if
    :: at & me -> goto tells
    :: else
    fi;
    STEP(arrive());
    goto over;

#if KILLS
killed:
    atomic { closed = closed | (held & me); goes = false; has_moved = false }
#if LEAVES
    if
    :: atomic { true -> gone = gone | me; goto left }
    :: true
    fi;
#endif
    /* let_run(), recover(). QEMU greets no second client while a guard has the connection of the first. */
#ifdef BESIDE_A_GUARD
    STEP(mine = epoch);
#else
    STEP_WHEN(!((held | asked) & me), mine = epoch);
#endif
    if
#ifdef ONLY_CONT_AT_START
    :: journal & me -> goto let_run
#else
    :: journal & me -> goto stay
#endif
    :: else -> goto tells
    fi;
#endif
left:
    skip
}

/* -- a guard ------------------------------------------------------------------------------------------------------- */

inline tell() {
    told = told | me;
    if
    :: back & me -> attach()
#ifndef GUARD_ONLY_CONT
    :: else -> cancel()
#else
    :: else
#endif
    fi;
    cont()
}

#ifdef REVERTS_WHAT_RAN
#define TAKES_BACK (held & me)
#else
#define TAKES_BACK (held & ~told & me)
#endif
/* Again and again. What is in its queue may have come after it has looked there. */
#define IS_OVERDUE (held & me && !calm && (~told | ~running | pending | (back & at)) & me)
#define HAS_LEFT (closed & ~asked & ~thanked & me)

proctype Guard(byte me) {
end:
    do
    /* _obey, _revert */
    :: atomic { asked & me && TAKES_BACK -> asked = asked & ~me; back = back | me; tell(); yes = yes | me }
    :: atomic { asked & me && !TAKES_BACK -> asked = asked & ~me; no = no | me }
    :: atomic { thanked & ~asked & me -> drop() }
    :: atomic { /* _thaw_overdue; _thaw_all_of, and the answer is read */
            IS_OVERDUE || HAS_LEFT ->
            tell();
            if
            :: HAS_LEFT -> drop()
            :: else
            fi
        }
#ifdef CLOSES_UNREAD
    /* When the last descriptor is closed QEMU drops what it has not read. */
    :: atomic { HAS_LEFT -> drop() }
#endif
    /* It is killed, and another one is started. */
    :: atomic { crashes > 0 && held & me -> crashes--; drop(); no = no | (asked & me); asked = asked & ~me }
    od
}

/* -- the coordinator: round.py, complete.py ------------------------------------------------------------------------ */

/* What it writes down is in the ledger, too. That it forgets is in decide.pml: here the ledger forgets nothing of a round
   that is over. */
proctype Coordinator() {
    bool went, passed = true; /* Completing.went; the targets hold the newest point */

    do
    :: atomic {
            storms > 0 || (idle == ALL && !held && !(calm && phase == ABORTED)) ->
            if
            :: storms > 0 -> storms--
            :: else -> calm = true
            fi;
            assert(epoch < 128);
            epoch = (epoch -> epoch << 1 : 1);
            kind = (went || passed -> PIVOT : PASS);
            phase = OPENED; arrived = 0; cuts = 0; awaited = true
        }
        do
        :: atomic { phase != ABORTED && !calm -> abort_epoch() } /* its sweep, its user, or it cannot publish */
        :: atomic {
                phase == READABLE || phase == ABORTED ->
                awaited = false;
                assert(!calm || phase == READABLE); /* P5 */
                if
                :: kind == PIVOT && phase == READABLE -> assert(at == ALL); goto completed
                :: kind == PIVOT && phase == ABORTED ->
#ifndef GO_NOT_LOOKED_AT
                    went = went || ((go | doubtful) & epoch); /* _may_have_gone */
#endif
                    passed = false
                :: kind == PASS && phase == READABLE ->
                    assert(!(at | pending)); /* P2: the movers write */
                    passed = true
                :: else -> passed = false
                fi;
                break
            }
        od
    :: atomic { storms == 0 && gone && (idle | gone) == ALL -> break } /* without that agent nothing comes of it */
    :: atomic { calm && phase == ABORTED -> break }                    /* TRIES */
    :: atomic { storms == 0 && !went -> assert(!at); break } /* P5: given up, or told not to complete */
    od;
completed:
    skip
}

#if LOSSES
/* Redis is started again, or another takes its place. */
active proctype Restart() {
    byte before, phase_, arrived_, cuts_, go_, abort_;
end:
    atomic {
        phase == OPENED ->
        before = epoch; phase_ = phase; arrived_ = arrived; cuts_ = cuts; go_ = go; abort_ = abort
    }
end_of_it:
    atomic {
        epoch == before && phase != OPENED && awaited && !calm ->
        restarted = restarted | epoch;
        phase = phase_; arrived = arrived_; cuts = cuts_; go = go_; abort = abort_;
        before = 0; phase_ = 0; arrived_ = 0; cuts_ = 0; go_ = 0; abort_ = 0
    }
}
#endif

active proctype Stuck() {
end:
    timeout ->
    assert(running == ALL && !pending); /* P4 */
    assert(!(held | asked))
}

init {
    atomic {
        run Agent(1);
        run Agent(2);
        run Guard(1);
        run Guard(2);
        run Coordinator()
    }
}
