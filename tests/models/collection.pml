/*
 * Who may remove what of a repository (docs/REPOSITORY.md), for spin.
 *
 * Every `atomic` is one request to the store, with what its caller concludes from the answer; between two of them anybody
 * else may act. Whoever is killed, or sleeps, is not chosen any more, or not for long. Comments name the functions whose
 * steps these are: who changes their order changes it here, too.
 *
 * Asserted, wherever something is decided or removed:
 *   - every run of each point that is there, of each that somebody holds, and of each epoch that may still be published
 *     can be read: from its pack, or from where moved/ says it is
 *   - no epoch that got a tombstone becomes a point, and no point gets a tombstone
 * And with LAST_ROUNDS: when all have ended or were killed, so many more prunes leave nothing but what points lead to.
 *
 * test_models.py has the scenarios (which of the processes below there are), and the mutations (#ifdef): steps left out
 * or in another order, of which each has to be found out.
 */

/* Epochs, a bit each: four of group G, whose points are pruned, two of group H, and the numbers of two compactions. */
#define G1 1
#define G2 2
#define G3 4
#define G4 8
#define H1 16
#define H2 32
#define K1 64
#define K2 128
#define GROUP_G (G1 | G2 | G3 | G4)
#define GROUP_H (H1 | H2)
#define COMPACTION (K1 | K2)

/* Packs: P0 is there at first, P1 and P2 are what two writers write, Q1 and Q2 what two compactions write. */
#define P0 1
#define P1 2
#define P2 4
#define Q1 8
#define Q2 16
#define MOVED_P0 32 /* moved/P0, among keys */

/* Runs: A and B are in P0, C in P1, D in P2. */
#define A 1
#define B 2
#define C 4
#define D 8

/* What there is in a scenario. */
#ifndef WRITERS_G
#define WRITERS_G 0
#endif
#ifndef WRITERS_H
#define WRITERS_H 0
#endif
#ifndef READERS
#define READERS 0
#endif
#ifndef PRUNES
#define PRUNES 1
#endif
#ifndef ROUNDS /* how often all pruning processes together begin */
#define ROUNDS 2
#endif
#ifndef COMPACTIONS
#define COMPACTIONS 0
#endif
#ifndef TAKES /* runs that a writer may find in the index of blocks */
#define TAKES (A | B | C | D)
#endif
/* ALL_PUBLISH: no job is cancelled. ONE_LISTING: all that a listing asks for at once, where nobody writes group G. */
#ifndef KEEP_ALL
#define KEEP_ALL 0
#endif
#ifndef NOMINATED /* 1: P0 is to be moved from the first, and compactions nominate nothing */
#define NOMINATED 0
#endif
#ifndef HOURS /* 1: once, somebody is silent for an hour */
#define HOURS 0
#endif
#ifndef LAST_ROUNDS
#define LAST_ROUNDS 0
#endif
#define RECORDS (ROUNDS + LAST_ROUNDS)
#ifndef FIRST_G1 /* runs that the points which are there at first lead to */
#define FIRST_G1 A
#endif
#ifndef FIRST_G2
#define FIRST_G2 0
#endif
#ifndef FIRST_H1
#define FIRST_H1 0
#endif

/* The store. */
byte manifests = G1 | G2 | H1, tombstones; /* groups/<group>/points/<epoch>.json */
byte floor, keep, retained;     /* groups/G/retained/<n>.json, the newest: epochs up to the floor, those of them kept, n */
byte holds, stale;              /* holds/epoch-…, holds/compaction-…; those of them not renewed for an hour */
byte pins[6];                   /* the parent an epoch's hold names */
byte reader_hold;               /* holds/read-…: its point */
bool reader_stale;
byte packs = P0, origin[2];     /* packs/…; the epochs that the heads of P1 and P2 name */
byte moved_to, moved_runs;      /* moved/P0: its target, and the runs that it says are there */
byte condemned, bound;          /* condemned/… of kind "remove"; those of them that have their open epochs */
byte keys[RECORDS], open[RECORDS], records;
byte nominated = NOMINATED, bound_move = NOMINATED, open_move[2]; /* of kind "move": of P0, one by each compaction */

/* What nobody stores. */
byte refs[6];                   /* the runs that an epoch leads to, or will when it is published */
byte reading;                   /* the point that a reader holds */
byte ended;                     /* epochs that got a tombstone */
byte rounds = ROUNDS;
bool keep_all = KEEP_ALL;       /* prunes drop no point */

#define IF(condition, value) ((condition) -> (value) : 0)
#define INDEX(e) ((e) == G1 -> 0 : ((e) == G2 -> 1 : ((e) == G3 -> 2 : ((e) == G4 -> 3 : ((e) == H1 -> 4 : 5)))))
#define REFS(some) (IF((some) & G1, refs[0]) | IF((some) & G2, refs[1]) | IF((some) & G3, refs[2]) \
    | IF((some) & G4, refs[3]) | IF((some) & H1, refs[4]) | IF((some) & H2, refs[5]))
#define PINS(some) (IF((some) & G3, pins[2]) | IF((some) & G4, pins[3]) | IF((some) & H2, pins[5]))
#define PACKS_OF(runs) (IF((runs) & (A | B), P0) | IF((runs) & C, P1) | IF((runs) & D, P2))
#define UP_TO(some) ((some) | ((some) >> 1) | ((some) >> 2) | ((some) >> 3))
#define KEYS_OF(n) IF(condemned & (1 << (n)), keys[n])

/* Group.present, Group.is_decided, reach.moved_packs (a record whose target is gone moves nothing) */
#define PRESENT(some, floor, keep) ((some) & (~(floor) | (keep)))
#define DECIDED(some, floor) ((some) | (floor))
#define MOVED_P0_TO (packs & moved_to)

/* Points that somebody holds: a reader while its hold is fresh, an epoch until it is decided. */
#define READER_HOLDS IF(!reader_stale, reader_hold)
#define HELD (PINS(holds) | READER_HOLDS)

#define READABLE ((packs & P0 -> A | B : IF(MOVED_P0_TO, moved_runs)) | IF(packs & P1, C) | IF(packs & P2, D))
#define POINTS PRESENT(manifests, floor, keep)
#define UNDECIDED (~DECIDED(manifests | tombstones, floor))
#define WANTED (REFS(POINTS | UNDECIDED) | IF(!reader_stale, REFS(reading)))
#define check_all() assert(!(WANTED & ~READABLE) && !(ended & POINTS) && !(manifests & tombstones))

inline let_go(e) { atomic { holds = holds & ~(e); stale = stale & ~(e) } }

/* epochs.abandon */
inline abandon(e) {
#ifdef LET_GO_FIRST
    let_go(e);
#endif
    atomic {
        if
        :: !((manifests | tombstones) & (e)) ->
            tombstones = tombstones | (e);
            ended = ended | ((e) & ~floor);
            check_all()
        :: else
        fi
    }
    let_go(e)
}

/* Decisions.groups_to_keep: retention records, then holds, then decisions. Who is made from a point that is missing from
   the record had its hold before, so it has it still, or is decided and seen. */
inline list_groups() {
#if defined(ONE_LISTING)
    atomic { floor_ = floor; keep_ = keep; held = HELD; points = manifests; decided = manifests | tombstones }
#elif defined(POINTS_FIRST)
    atomic { points = manifests; decided = manifests | tombstones }
    atomic { floor_ = floor; keep_ = keep }
    atomic { held = HELD }
#else
    atomic { floor_ = floor; keep_ = keep }
#ifndef HELD_ONLY_WHEN_RETAINED
    atomic { held = HELD }
#endif
    atomic { points = manifests; decided = manifests | tombstones }
#endif
}

/* reach.live_points: what is read one after the other of what was listed. What a prune has taken away meanwhile is a
   reason to list again, for something may have been published in its place. */
#ifdef PASS_OVER_VANISHED
#define VANISHED 0
#else
#define VANISHED (points & (~floor_ | keep_ | held) & ~manifests)
#endif
#define LIVE REFS(points & (~floor_ | keep_ | held) & manifests)

/* collect.forget_moved. A nomination stays until its packs are moved or gone: another may be about to move them. */
inline forget_moved() {
    if
    :: nominated && (MOVED_P0_TO || !(packs & P0)) -> nominated = 0
    :: else
    fi;
    forget_open()
}
inline forget_open() {
    bound_move = bound_move & nominated;
    open_move[0] = IF(nominated & 1, open_move[0]);
    open_move[1] = IF(nominated & 2, open_move[1])
}

/* collect.forbidden_packs: condemned/ of all kinds, then moved/ */
inline look_at_condemned() {
    atomic {
        forbidden = forbidden | IF(nominated, P0);
        n = 0;
        do
        :: n < RECORDS -> forbidden = forbidden | KEYS_OF(n); n++
        :: else -> n = 0; break
        od
    }
}
inline look_at_moved() { atomic { forbidden = forbidden | IF(moved_to, P0) } }
inline look() {
#if defined(NO_INDEX_CHECK)
    look_at_moved()
#elif defined(NO_MOVED_CHECK)
    look_at_condemned()
#elif defined(MOVED_BEFORE_CONDEMNED)
    look_at_moved(); look_at_condemned()
#else
    look_at_condemned(); look_at_moved()
#endif
}

/* A job whose target is the repository: opens an epoch of `group`, writes the pack `own` with the run `mine`, publishes. */
proctype Writer(byte group; byte own; byte mine) {
    byte epoch, parent, present, other, forbidden, n;
    /* epochs.open_epoch: `seen`, then the holds of the group */
    atomic {
        epoch = DECIDED(manifests | tombstones, floor) & group;
        present = POINTS & group
    }
    atomic {
        other = holds & group & ~epoch;
        if
        :: other & ~stale -> goto refused
        :: else
        fi
    }
    if
    :: other -> abandon(other)
    :: else
    fi;
    atomic {
        epoch = (group == GROUP_G -> UP_TO(epoch | other) + 1 : H2);
        other = 0;
        if
        :: group == GROUP_G && epoch > G4 -> goto refused /* no more in this model */
        :: else
        fi;
        if /* _newest_with: the newest that has the disk, and not always the newest of all */
        :: present & G1 -> parent = G1
        :: present & G2 -> parent = G2
        :: present & G3 -> parent = G3
        :: present & H1 -> parent = H1
        :: else
        fi;
        present = 0
    }
#ifdef LOOK_BEFORE_HOLD
    look();
#endif
    atomic { /* Decisions.announce */
        if
        :: holds & epoch -> goto refused
        :: else -> holds = holds | epoch; pins[INDEX(epoch)] = parent
        fi
    }
    atomic { /* the holds again: `first` */
        if
        :: holds & group & (epoch - 1) -> goto over
        :: else
        fi
    }
    atomic { /* Decisions.about */
        if
        :: DECIDED(manifests | tombstones, floor) & epoch -> goto over
        :: else
        fi;
#ifndef NO_PARENT_CHECK
        if
        :: parent & ~POINTS -> goto over
        :: else
        fi;
#endif
        if
        :: refs[INDEX(epoch)] = REFS(parent) /* nothing of it was written over */
        :: true
        fi
    }
#ifndef LOOK_BEFORE_HOLD
    look();
#endif
    atomic { /* SqliteIndex.find, which asks the store for the pack */
        if
        :: (TAKES & A) && (packs & P0 & ~forbidden) -> refs[INDEX(epoch)] = refs[INDEX(epoch)] | A
        :: (TAKES & B) && (packs & P0 & ~forbidden) -> refs[INDEX(epoch)] = refs[INDEX(epoch)] | B
        :: (TAKES & C) && (packs & P1 & ~forbidden & ~own) -> refs[INDEX(epoch)] = refs[INDEX(epoch)] | C
        :: (TAKES & D) && (packs & P2 & ~forbidden & ~own) -> refs[INDEX(epoch)] = refs[INDEX(epoch)] | D
        :: true
        fi;
        forbidden = 0
    }
    atomic { /* PackWriter.close */
        packs = packs | own;
        origin[own >> 2] = epoch;
        refs[INDEX(epoch)] = refs[INDEX(epoch)] | mine
    }
#if HOURS
    if
    :: true
    :: true ->
        atomic { /* Backups._renew_hold */
            if
            :: DECIDED(manifests | tombstones, floor) & epoch -> goto over
            :: else
            fi
        }
        atomic { holds = holds | epoch; stale = stale & ~epoch }
    fi;
#endif
    if
    :: true ->
        atomic { /* epochs.publish, Decisions.decide */
#ifdef PLAIN_PUT
            tombstones = tombstones & ~epoch;
#else
            if
            :: (manifests | tombstones) & epoch -> goto over
            :: else
            fi;
#endif
            manifests = manifests | epoch;
            check_all()
        }
#ifndef ALL_PUBLISH
    :: true -> abandon(epoch); goto refused
#endif
#if LAST_ROUNDS
    :: true -> goto refused /* killed */
#endif
    fi;
over:
    let_go(epoch);
refused:
    skip
}

/* A restore, a verify or a serve. */
proctype Reader() {
    byte point;
    atomic { /* Decisions.hold_point: the point, the hold, whether the point is still there */
        if
        :: POINTS & G1 -> point = G1
        :: POINTS & G2 -> point = G2
        fi
    }
    atomic { reader_hold = point }
    atomic {
        if
        :: POINTS & point -> reading = point; check_all()
        :: else
        fi
    }
#if LAST_ROUNDS
    if
    :: true
    :: true -> goto killed
    fi;
#endif
    atomic { reader_hold = 0; reader_stale = false; reading = 0 }
killed:
    skip
}

/* collect.may_go: an epoch is over when it is decided, or its hold is gone */
#if defined(NO_WAIT)
#define UNFINISHED 0
#elif defined(GONE_IS_NOT_OVER)
#define UNFINISHED ~decided
#else
#define UNFINISHED open_epochs & ~decided
#endif

/* collect.prune, again and again. */
proctype Prune() {
    byte points, decided, floor_, keep_, number, held, present;
    byte sentences, unbound, their_keys[RECORDS], their_open[RECORDS], known;
    byte open_epochs, leftovers, alive, dead, n;
begin:
    atomic {
        if
        :: rounds > 0 -> rounds--
        :: else -> goto done
        fi
    }
#if HOURS || LAST_ROUNDS
    /* _abandon_stale */
    atomic {
        held = holds & stale;
        if
        :: reader_stale -> reader_hold = 0
        :: else
        fi
    }
    do
    :: held & G3 -> abandon(G3); held = held & ~G3
    :: held & G4 -> abandon(G4); held = held & ~G4
    :: held & H2 -> abandon(H2); held = held & ~H2
    :: held & COMPACTION -> let_go(held & COMPACTION); held = held & ~COMPACTION
    :: else -> break
    od;
#endif
    /* _retain, of group G. Its points may be any that a policy keeps: the newest is among them. */
#ifdef POINTS_FIRST
    atomic { points = manifests; decided = manifests | tombstones }
#endif
    atomic { floor_ = floor; keep_ = keep; number = retained }
#ifndef POINTS_FIRST
    atomic { points = manifests; decided = manifests | tombstones }
#endif
    atomic { /* Decisions.points, which cannot but fail in `retain` if one of them is gone */
        points = PRESENT(points & manifests, floor_, keep_) & GROUP_G;
        present = PRESENT(decided, floor_, keep_) & GROUP_G;
        decided = DECIDED(decided, floor_) & GROUP_G
    }
    atomic { /* the holds, as late as may be */
        held = PINS(holds & ~stale) | READER_HOLDS | (points & G4 -> G4 : (points & G3 -> G3 : (points & G2 -> G2 : G1)));
        if
        :: !keep_all && (points & ~held & G1) -> points = points & ~G1
        :: true
        fi;
        if
        :: !keep_all && (points & ~held & G2) -> points = points & ~G2
        :: true
        fi;
        if
        :: !keep_all && (points & ~held & G3) -> points = points & ~G3
        :: true
        fi
    }
    atomic { /* Decisions.retain */
        if
        :: points != present && retained == number ->
            retained++;
            floor = UP_TO(decided);
            keep = points;
            check_all()
        :: else
        fi;
        if
        :: points != present && retained != number + 1 -> number = 255 /* another prune was quicker: RefusedError */
        :: else -> number = 0
        fi;
        points = 0; decided = 0; floor_ = 0; keep_ = 0; held = 0; present = 0;
        if
        :: number -> number = 0; goto begin
        :: else
        fi
    }
    /* collect */
    atomic { /* sentences_of */
        sentences = condemned;
        unbound = condemned & ~bound;
        do
        :: n < RECORDS ->
            known = known | KEYS_OF(n);
            their_keys[n] = keys[n];
            their_open[n] = open[n];
            n++
        :: else -> n = 0; break
        od
    }
    do /* bound, of those whose writer did not come to it */
    :: n < RECORDS && unbound & (1 << n) ->
        atomic { their_open[n] = holds }
        atomic {
            if
            :: condemned & (1 << n) -> open[n] = their_open[n]; bound = bound | (1 << n)
            :: else
            fi;
            n++
        }
    :: n < RECORDS && !(unbound & (1 << n)) -> n++
    :: else -> break
    od;
    atomic { open_epochs = holds; n = 0; unbound = 0 }
    list_groups();
    leftovers = decided & floor_ & ~keep_ & ~held;
    number = DECIDED(decided, floor_) | (COMPACTION & ~open_epochs); /* whatever is listed again below */
    do
    :: atomic { !VANISHED -> alive = PACKS_OF(LIVE); break }
    :: VANISHED -> list_groups()
    od;
    atomic { /* reach._follow_moves */
        decided = number;
        points = 0; floor_ = 0; keep_ = 0; held = 0; number = 0;
        if
        :: alive & P0 && MOVED_P0_TO -> alive = (alive & ~P0) | moved_to | MOVED_P0
        :: else
        fi
    }
#ifdef NO_RECHECK
    alive = 0;
#endif
    do
    :: n < RECORDS && sentences & (1 << n) && !(their_open[n] & UNFINISHED) ->
        atomic { /* _execute */
            packs = packs & ~(their_keys[n] & ~alive);
            if
            :: their_keys[n] & ~alive & MOVED_P0 -> moved_to = 0; moved_runs = 0
            :: else
            fi;
            check_all()
        }
        atomic {
            condemned = condemned & ~(1 << n);
            bound = bound & ~(1 << n);
            keys[n] = 0;
            open[n] = 0;
            n++
        }
    :: n < RECORDS && !(sentences & (1 << n) && !(their_open[n] & UNFINISHED)) -> n++
    :: else -> break
    od;
    atomic { /* forget_moved, and _dead: what the one looks at does not change again */
#ifndef NOMINATION_DROPPED
        forget_moved();
#endif
        n = 0;
        do
        :: n < RECORDS -> their_keys[n] = 0; their_open[n] = 0; n++
        :: else -> n = 0; break
        od;
        dead = (packs | IF(moved_to, MOVED_P0)) & ~alive & ~known & ~IF(origin[0] & ~decided, P1) &
            ~IF(origin[1] & ~decided, P2) & ~IF(K1 & ~decided, Q1) & ~IF(K2 & ~decided, Q2);
        sentences = 0; known = 0; alive = 0; decided = 0; open_epochs = 0
    }
#ifdef REMOVE_AT_ONCE
    atomic { packs = packs & ~dead; dead = 0; check_all() }
#endif
    if
    :: dead ->
#ifdef OPEN_BEFORE_CONDEMN
        atomic { open_epochs = holds }
#endif
        atomic { /* condemn */
            n = records;
            records++;
            keys[n] = dead;
            condemned = condemned | (1 << n);
            dead = 0
        }
#if LAST_ROUNDS
        if
        :: true
        :: !keep_all -> leftovers = 0; n = 0; goto done /* killed */
        fi;
#endif
#ifndef OPEN_BEFORE_CONDEMN
        atomic { open_epochs = holds }
#endif
        atomic { /* bound */
            if
            :: condemned & (1 << n) -> open[n] = open_epochs; bound = bound | (1 << n)
            :: else
            fi;
            n = 0;
            open_epochs = 0
        }
    :: else
    fi;
    atomic { /* prune_leftovers */
        manifests = manifests & ~leftovers;
        tombstones = tombstones & ~leftovers;
        leftovers = 0
    }
    goto begin;
done:
    skip
}

/* compact.compact, twice: what could not be moved at once is moved by the next. */
proctype Compaction(byte me; byte own; byte mine) {
    byte ready, their_open[2], open_epochs, points, decided, floor_, keep_, held, live, n;
    bool again = NOMINATED;
begin:
    /* _move_nominated */
    atomic {
        ready = nominated;
        their_open[0] = open_move[0];
        their_open[1] = open_move[1];
        n = nominated & ~bound_move
    }
    if /* bound */
    :: n & 1 ->
        atomic { their_open[0] = holds }
        atomic {
            if
            :: nominated & 1 -> open_move[0] = their_open[0]; bound_move = bound_move | 1
            :: else
            fi
        }
    :: else
    fi;
    if
    :: n & 2 ->
        atomic { their_open[1] = holds }
        atomic {
            if
            :: nominated & 2 -> open_move[1] = their_open[1]; bound_move = bound_move | 2
            :: else
            fi
        }
    :: else
    fi;
    atomic { open_epochs = holds; n = 0 }
    atomic { floor_ = floor }
    atomic {
        decided = manifests | tombstones;
#ifndef MOVE_AT_ONCE
        decided = DECIDED(decided, floor_) | (COMPACTION & ~open_epochs);
        ready = ready & ~IF(their_open[0] & UNFINISHED, 1) & ~IF(their_open[1] & UNFINISHED, 2);
#endif
        their_open[0] = 0; their_open[1] = 0; open_epochs = 0;
        decided = 0; floor_ = 0;
        if
        :: ready == 0 -> goto nominate
        :: else
        fi
    }
    /* _live */
    atomic { live = (MOVED_P0_TO -> 0 : A | B) }
    list_groups();
    do
    :: atomic { !VANISHED -> live = live & LIVE; break }
    :: VANISHED -> list_groups()
    od;
    points = 0; decided = 0; floor_ = 0; keep_ = 0; held = 0;
    atomic { holds = holds | me } /* _Mover */
    atomic {
        if
        :: !live || !(packs & P0) -> goto leave
        :: else
        fi
    }
    atomic { packs = packs | own }
#if LAST_ROUNDS
    if
    :: true
    :: true -> goto killed
    fi;
#endif
    atomic { /* finish: _check_hold, and the record. Who sleeps for an hour in between is killed by its lease's timer. */
        if
        :: !(holds & me) -> ready = 0; goto leave
        :: else
        fi;
#ifdef SLEEPS_BEFORE_RECORD
    }
    atomic {
#endif
        if /* Relocations.write */
        :: !MOVED_P0_TO -> moved_to = own; moved_runs = live; check_all()
        :: else
        fi
    }
leave:
    let_go(me);
#ifdef NOMINATION_DROPPED
    atomic { nominated = nominated & ~ready; forget_open() }
#else
    atomic { forget_moved() }
#endif
nominate:
    ready = 0; live = 0;
    if
    :: !again ->
        again = true;
        atomic { /* _nominate: mostly dead, not condemned, not moved */
            do
            :: n < RECORDS -> live = live | KEYS_OF(n); n++
            :: else -> n = 0; break
            od;
            if
            :: !(packs & P0) || MOVED_P0_TO || nominated || (live & P0) -> live = 0; goto begin
            :: else -> live = 0
            fi
        }
        atomic { nominated = nominated | mine }
        atomic { open_epochs = holds }
        atomic {
            if
            :: nominated & mine -> open_move[mine >> 1] = open_epochs; bound_move = bound_move | mine
            :: else
            fi;
            open_epochs = 0
        }
        goto begin
    :: else
    fi;
killed:
    skip
}

#if HOURS
/* An hour in which somebody is silent. */
active proctype Clock() {
    if
    :: atomic { holds & GROUP_G -> stale = stale | (holds & GROUP_G) }
    :: atomic { holds & GROUP_H -> stale = stale | (holds & GROUP_H) }
    :: atomic { holds & COMPACTION -> stale = stale | (holds & COMPACTION) }
    :: atomic { reader_hold -> reader_stale = true }
    fi
}
#endif

init {
    atomic {
        refs[0] = FIRST_G1; refs[1] = FIRST_G2; refs[4] = FIRST_H1;
#if WRITERS_G
        run Writer(GROUP_G, P1, C);
#endif
#if WRITERS_G > 1
        run Writer(GROUP_G, P2, D);
#endif
#if WRITERS_H
        run Writer(GROUP_H, P2, D);
#endif
#if READERS
        run Reader();
#endif
#if COMPACTIONS
        run Compaction(K1, Q1, 1);
#endif
#if COMPACTIONS > 1
        run Compaction(K2, Q2, 2);
#endif
#if PRUNES > 1
        run Prune();
#endif
        run Prune()
    }
#if LAST_ROUNDS
    _nr_pr == 1 -> /* all have ended or were killed, and nobody renews a hold */
    atomic { stale = holds; reader_stale = true; rounds = LAST_ROUNDS; keep_all = true; run Prune() }
    _nr_pr == 1 ->
    assert(packs == (PACKS_OF(REFS(POINTS)) & ~IF(MOVED_P0_TO, P0) | IF(REFS(POINTS) & (A | B), MOVED_P0_TO)));
    assert(!condemned && !holds && !reader_hold)
#endif
}
