//! Tables of events and what is decided.

use mentee_cluster::{Hello, Phase, Progress};
use mentee_config::exit_code::DIVERGED;

use super::*;

fn hello(rank: u32) -> Hello {
    Hello {
        rank,
        world_size: 2,
        host: format!("host{rank}"),
        pid: 1,
        plan_hash: "p".into(),
        data_digest: "d".into(),
        version: "0".into(),
    }
}

fn go() -> Event {
    Event::Coordinator(Output::Go { generation: 0, ranks: vec![hello(0), hello(1)] })
}

fn failed(rank: u32, exit_code: i32) -> Event {
    let message = format!("rank {rank} says {exit_code}");
    let event = WorkerEvent::Failed { step: 8, phase: Phase::Update, message, exit_code, peers: None };
    Event::Coordinator(Output::Event { rank, event })
}

fn missed(rank: u32, peers: &[u32]) -> Event {
    let message = format!("rank {rank} waited in vain");
    let peers = Some(peers.to_vec());
    let event = WorkerEvent::Failed { step: 8, phase: Phase::Reduce, message, exit_code: 1, peers };
    Event::Coordinator(Output::Event { rank, event })
}

fn gathering(generation: u32) -> Event {
    Event::Coordinator(Output::Gathering { generation })
}

fn lost(rank: u32) -> Event {
    let host = format!("host{rank}");
    Event::Coordinator(Output::Lost { rank, host, step: 7, phase: Phase::Backward, why: "x".into() })
}

fn refused(exit_code: i32) -> Event {
    Event::Coordinator(Output::Refused { rank: 1, reason: "no".into(), ours: true, exit_code })
}

fn finished(exit_code: i32) -> Event {
    Event::Coordinator(Output::AllFinished { exit_code })
}

fn run(max_restarts: u32, events: Vec<Event>) -> Vec<Action> {
    let (mut supervisor, mut actions) = Supervisor::new(max_restarts, false, 1, false);
    for (second, event) in events.into_iter().enumerate() {
        actions.extend(supervisor.handle_event(Duration::from_secs(10 * second as u64), event));
    }
    actions
}

fn end(actions: &[Action]) -> Option<(i32, Option<&Culprit>)> {
    match actions.last() {
        Some(Action::Finish(outcome)) => Some((outcome.exit_code, outcome.culprit.as_ref())),
        _ => None,
    }
}

const SETTLED: Event = Event::Settled { said: None, launch_failure: None, out_of_memory: false };
const KILLED: Event = Event::Exited(Exit::Signal(libc::SIGKILL));

/// Events without any restart left, and the exit code they end with.
#[test]
fn how_a_run_ends() {
    let exited = |code| Event::Exited(Exit::Code(code));
    let interrupt = Event::Signal(StopSignal::Interrupt);
    let said =
        Event::Settled { said: Some("what was wrong".into()), launch_failure: None, out_of_memory: false };
    let table: Vec<(&str, Vec<Event>, i32)> = vec![
        ("all is well", vec![go(), finished(0), exited(0), SETTLED], 0),
        ("last words after the end of the process", vec![go(), exited(0), finished(0), SETTLED], 0),
        ("a worker that knows no coordinator", vec![exited(0), SETTLED], 0),
        ("mpirun stumbles after all ranks finished", vec![go(), finished(0), exited(9), SETTLED], 0),
        ("bad recipe, before hello", vec![exited(2), said.clone()], 2),
        (
            "bad data, after hello but without a message",
            vec![go(), lost(0), lost(1), exited(3), said.clone()],
            3,
        ),
        ("a crash by a signal whose number looks like a code", vec![go(), exited(4), SETTLED], 5),
        (
            "bad data, said by the rank, mpirun adds its own code",
            vec![go(), failed(1, 3), exited(15), SETTLED],
            3,
        ),
        ("no usable checkpoint", vec![exited(4), said.clone()], 4),
        ("diverged", vec![go(), failed(0, 6), failed(1, 1), exited(6), SETTLED], 6),
        (
            "diverged, but the other rank's broken connection came first",
            vec![go(), lost(1), failed(0, 6), exited(6), SETTLED],
            6,
        ),
        ("a crash", vec![go(), lost(1), KILLED, SETTLED], 5),
        ("a crash whose mpirun says 2", vec![go(), lost(1), exited(2), SETTLED], 5),
        ("a failure of its own", vec![go(), failed(1, 1), exited(1), SETTLED], 5),
        ("exit 0 of mpirun although a rank was lost", vec![go(), lost(1), exited(0), SETTLED], 5),
        ("refused", vec![refused(2), exited(1), SETTLED], 2),
        ("refused: it sees other data", vec![refused(3), exited(1), SETTLED], 3),
        ("preempted by someone else", vec![go(), finished(75), exited(75), SETTLED], 75),
        ("stopped", vec![go(), interrupt.clone(), finished(75), exited(75), SETTLED], 75),
        (
            "stopped, but it was done already",
            vec![go(), interrupt.clone(), finished(0), exited(0), SETTLED],
            0,
        ),
        ("stopped, then killed", vec![go(), interrupt.clone(), interrupt.clone(), KILLED, SETTLED], 75),
        ("a rank crashes while stopping", vec![go(), interrupt.clone(), lost(0), exited(1), SETTLED], 75),
        ("a signal while the dust settles", vec![go(), lost(0), exited(1), interrupt, SETTLED], 75),
    ];
    for (name, events, code) in table {
        let actions = run(0, events);
        assert_eq!(end(&actions).map(|(code, _)| code), Some(code), "{name}: {actions:?}");
    }
}

#[test]
fn the_exit_code_of_a_single_worker_is_its_own() {
    let end = |direct| {
        let (mut supervisor, _) = Supervisor::new(0, direct, 1, false);
        let mut actions = Vec::new();
        for event in [go(), lost(0), Event::Exited(Exit::Code(DIVERGED)), SETTLED] {
            actions.extend(supervisor.handle_event(Duration::ZERO, event));
        }
        end(&actions).map(|(code, _)| code)
    };
    assert_eq!(end(true), Some(DIVERGED));
    assert_eq!(end(false), Some(RANK_FAILED), "mpirun's 6 may be an abort");
}

#[test]
fn a_crash_is_restarted_until_the_budget_is_spent() {
    let crash =
        |generation| [gathering(generation), go(), lost(1), KILLED, SETTLED, Event::Due(Timer::Backoff)];
    let actions = run(2, (0..3).flat_map(crash).collect());
    let starts: Vec<u32> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Start { generation } => Some(*generation),
            _ => None,
        })
        .collect();
    assert_eq!(starts, [0, 1, 2]);
    let waits: Vec<Duration> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Arm(Timer::Backoff, wait) => Some(*wait),
            _ => None,
        })
        .collect();
    assert_eq!(waits, [BACKOFF, 2 * BACKOFF]);
    let (code, culprit) = end(&actions).expect("over");
    assert_eq!(code, RANK_FAILED);
    assert_eq!(
        culprit.expect("named").to_string(),
        "rank 1 on host1 at step 7 (backward): its process ended without a word (its launcher: killed (SIGKILL))"
    );
    assert_eq!(actions.iter().filter(|action| matches!(action, Action::RecordRestart { .. })).count(), 2);
}

#[test]
fn the_first_failure_is_the_cause() {
    let actions =
        run(0, vec![go(), failed(1, 1), failed(0, 1), lost(0), Event::Exited(Exit::Code(1)), SETTLED]);
    let (_, culprit) = end(&actions).expect("over");
    assert_eq!(culprit.expect("named").to_string(), "rank 1 on host1 at step 8 (update): rank 1 says 1");
}

/// Every order in which three ranks' last words can be heard, before and after the end of their launcher.
#[test]
fn the_cause_is_named_whatever_the_order_of_last_words() {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let killed = [lost(1), missed(0, &[]), missed(2, &[1])];
    let failed_by_itself = [failed(1, 1), missed(0, &[]), missed(2, &[1])];
    let diverged = [failed(1, DIVERGED), missed(0, &[]), lost(2)];
    let table: [(&str, [Event; 3], &str); 3] = [
        ("killed", killed, "rank 1 on host1 at step 7 (backward): its process ended without a word"),
        ("failed", failed_by_itself, "rank 1 on host1 at step 8 (update): rank 1 says 1"),
        ("diverged", diverged, "rank 1 on host1 at step 8 (update): rank 1 says 6"),
    ];
    for (name, words, expected) in table {
        for order in orders {
            for heard_before in 0..=3 {
                let mut events: Vec<Event> = order.iter().map(|&n| words[n].clone()).collect();
                events.insert(heard_before, Event::Exited(Exit::Code(1)));
                events.insert(0, go());
                events.extend([SETTLED, SETTLED]);
                let actions = run(0, events);
                let (_, culprit) = end(&actions).expect("over");
                let said = culprit.expect("named").to_string();
                assert!(said.starts_with(expected), "{name}, {order:?}, {heard_before} before: {said}");
            }
        }
    }
}

#[test]
fn a_rank_that_missed_another_is_no_cause_and_no_mark_against_its_machine() {
    // The cause is waited for a little longer than usual, once.
    let actions = run(0, vec![go(), missed(0, &[]), Event::Exited(Exit::Code(1)), SETTLED]);
    assert_eq!(actions.last(), Some(&Action::Arm(Timer::Settle, SETTLE_LONGER)));
    let actions = run(0, vec![go(), missed(0, &[]), Event::Exited(Exit::Code(1)), SETTLED, SETTLED]);
    let (_, culprit) = end(&actions).expect("over");
    let alone = "rank 0 on host0 at step 8 (reduce): rank 0 waited in vain";
    assert_eq!(culprit.expect("named").to_string(), alone);
    let actions = run(0, vec![go(), missed(0, &[1]), Event::Exited(Exit::Code(1)), SETTLED, SETTLED]);
    let (_, culprit) = end(&actions).expect("over");
    let absent = "rank 1 on host1 at step 8: rank 0 missed it: rank 0 waited in vain";
    assert_eq!(culprit.expect("named").to_string(), absent);

    let (mut supervisor, mut actions) = Supervisor::new(9, false, 2, false);
    for generation in 0..4 {
        let crash = [
            gathering(generation),
            go(),
            missed(0, &[]),
            Event::Exited(Exit::Code(1)),
            SETTLED,
            SETTLED,
            Event::Due(Timer::Backoff),
        ];
        for event in crash {
            actions.extend(supervisor.handle_event(Duration::ZERO, event));
        }
    }
    assert!(!actions.iter().any(|action| matches!(action, Action::LeaveOut { .. })), "{actions:?}");
}

#[test]
fn once_the_cause_is_known_no_more_is_waited_for_than_after_it_alone() {
    let grace = |events: Vec<Event>| match run(0, events).last() {
        Some(Action::Arm(Timer::End, grace)) => *grace,
        other => panic!("{other:?}"),
    };
    assert_eq!(grace(vec![go(), missed(0, &[])]), END_GRACE);
    assert_eq!(grace(vec![go(), missed(0, &[]), lost(1)]), LOST_GRACE);
    assert_eq!(grace(vec![go(), lost(1), missed(0, &[])]), LOST_GRACE);
    // What has been told to end is not told again later.
    let actions = run(0, vec![go(), missed(0, &[]), Event::Due(Timer::End), lost(1)]);
    assert_eq!(actions.last(), Some(&Action::Arm(Timer::Kill, KILL_GRACE)));
}

#[test]
fn what_stands_still_is_killed_named_and_started_again() {
    let stalled = |kind| {
        let (rank, step, phase) = (1, 7, Phase::Backward);
        let stall = Stall { rank, step, phase, kind, lasted: Duration::from_secs(61) };
        Event::Coordinator(Output::Stalled { stall, host: "host1".into() })
    };
    // The others' ends follow from being killed.
    let actions =
        run(1, vec![go(), stalled(StallKind::Stuck), missed(0, &[]), lost(1), lost(0), KILLED, SETTLED]);
    assert_eq!(actions[1..3], [Action::Kill, Action::Arm(Timer::Kill, KILL_GRACE)]);
    let named = actions.iter().find_map(|action| match action {
        Action::RecordRestart { culprit, .. } => Some(culprit.to_string()),
        _ => None,
    });
    assert_eq!(
        named.as_deref(),
        Some("rank 1 on host1 at step 7 (backward): stalled: it lives, but has not gone on for 61 s")
    );
    let ends = actions.iter().filter(|action| matches!(action, Action::Arm(Timer::End, _))).count();
    assert_eq!(ends, 0, "SIGKILL is not followed by anything milder");
    // A gang that ends already is left to end.
    let actions = run(1, vec![go(), lost(0), stalled(StallKind::Silent)]);
    assert_eq!(actions.last(), Some(&Action::Arm(Timer::End, LOST_GRACE)));
}

#[test]
fn last_words_of_a_gang_that_was_judged_are_not_the_next_ones() {
    for late in [lost(0), missed(0, &[1]), finished(75), failed(0, 3)] {
        let (mut supervisor, _) = Supervisor::new(9, false, 2, false);
        let mut actions = Vec::new();
        for event in [
            go(),
            lost(1),
            KILLED,
            SETTLED,
            late.clone(),
            Event::Due(Timer::Backoff),
            late.clone(),
            gathering(1),
            go(),
            lost(1),
            KILLED,
            SETTLED,
        ] {
            actions.extend(supervisor.handle_event(Duration::ZERO, event));
        }
        let reasons: Vec<Option<u32>> = actions
            .iter()
            .filter_map(|action| match action {
                Action::RecordRestart { culprit, .. } => Some(culprit.rank),
                _ => None,
            })
            .collect();
        assert_eq!(reasons, [Some(1), Some(1)], "{late:?}: {actions:?}");
        let ends = actions.iter().filter(|action| matches!(action, Action::Arm(Timer::End, _))).count();
        assert_eq!(ends, 2, "{late:?}: both gangs are ended");
        assert!(actions.contains(&Action::LeaveOut { host: "host1".into() }), "{late:?}");
    }
}

#[test]
fn what_a_worker_said_is_better_than_that_it_went() {
    let said =
        |text: &str| Event::Settled { said: Some(text.into()), launch_failure: None, out_of_memory: false };
    let actions = run(0, vec![go(), lost(1), Event::Exited(Exit::Code(1)), said("disk full")]);
    let (_, culprit) = end(&actions).expect("over");
    assert_eq!(culprit.expect("named").to_string(), "rank 1 on host1 at step 7 (backward): disk full");
    let actions =
        run(0, vec![go(), lost(1), Event::Exited(Exit::Code(1)), said("rank 0: step 8: waited for 1")]);
    let (_, culprit) = end(&actions).expect("over");
    assert!(culprit.expect("named").cause.starts_with("its process ended without a word"));
    // Of a rank that was killed, another's complaint is no explanation.
    let actions = run(0, vec![go(), lost(1), Event::Exited(Exit::Code(9)), said("peer lost")]);
    let (_, culprit) = end(&actions).expect("over");
    assert!(culprit.expect("named").cause.starts_with("its process ended without a word"));
}

#[test]
fn a_kill_is_told_by_its_signal_and_what_made_the_kernel_kill() {
    let cause = |direct: bool, exit: Exit, out_of_memory: bool| {
        let (mut supervisor, _) = Supervisor::new(0, direct, 1, false);
        let settled = Event::Settled { said: None, launch_failure: None, out_of_memory };
        let events = [go(), lost(1), Event::Exited(exit), settled];
        let actions: Vec<Action> =
            events.into_iter().flat_map(|event| supervisor.handle_event(Duration::ZERO, event)).collect();
        let (code, culprit) = end(&actions).expect("over");
        assert_eq!(code, RANK_FAILED);
        culprit.expect("named").cause.clone()
    };
    let went = "its process ended without a word";
    for (code, name) in [(9, "SIGKILL"), (137, "SIGKILL"), (7, "SIGBUS"), (139, "SIGSEGV"), (15, "SIGTERM")] {
        let said = format!("{went} (its launcher: exit code {code}, as of {name})");
        assert_eq!(cause(false, Exit::Code(code), false), said);
    }
    for code in [1, 2, 75, 255] {
        let said = format!("{went} (its launcher: exit code {code})");
        assert_eq!(cause(false, Exit::Code(code), false), said);
    }
    assert_eq!(cause(true, Exit::Code(9), false), format!("{went} (exit code 9)"));
    let killed = cause(true, Exit::Signal(libc::SIGKILL), true);
    assert!(
        killed.starts_with(&format!("{went} (killed (SIGKILL)); the memory limit was reached: ")),
        "{killed}"
    );
}

#[test]
fn a_gang_that_does_not_end_is_ended() {
    let actions = run(0, vec![go(), lost(1), lost(0), Event::Due(Timer::End), Event::Due(Timer::Kill)]);
    let expected = [
        Action::Start { generation: 0 },
        Action::Arm(Timer::End, LOST_GRACE),
        Action::Terminate,
        Action::Arm(Timer::Kill, KILL_GRACE),
        Action::Kill,
        Action::Arm(Timer::Kill, KILL_GRACE),
    ];
    assert_eq!(actions, expected);
}

#[test]
fn a_stop_is_asked_for_once_and_then_enforced() {
    let actions = run(3, vec![go(), Event::Signal(StopSignal::Terminate), Event::Due(Timer::End)]);
    assert!(actions.contains(&Action::RequestStop { reason: "SIGTERM".into() }));
    assert!(actions.ends_with(&[Action::Terminate, Action::Arm(Timer::Kill, KILL_GRACE)]), "{actions:?}");
}

#[test]
fn a_restart_says_whether_there_is_something_to_go_on_from() {
    let saved = WorkerEvent::Checkpoint { step: 3, path: String::new(), digest: String::new() };
    let saved = Event::Coordinator(Output::Event { rank: 0, event: saved });
    let said = |events: Vec<Event>| {
        let says = |action| match action {
            Action::Say(line) if line.contains("restart 1 of 1") => Some(line),
            _ => None,
        };
        run(1, events).into_iter().find_map(says).expect("a restart")
    };
    let line = said(vec![go(), lost(1), KILLED, SETTLED]);
    assert!(line.contains("restart 1 of 1 from step 0, as there is no checkpoint yet, in 0.5 s"), "{line}");
    let line = said(vec![go(), saved, lost(1), KILLED, SETTLED]);
    assert!(line.contains("restart 1 of 1 from the last checkpoint in 0.5 s"), "{line}");
}

#[test]
fn a_stop_waits_for_steps_that_take_long() {
    let grace_of = |least: Duration, step_ms: f64| {
        let progress = Progress { step: 7, step_ms: Some(step_ms), ..Progress::default() };
        let events = vec![
            go(),
            Event::Coordinator(Output::Progress { rank: 0, progress }),
            Event::Signal(StopSignal::Warning),
        ];
        let (mut supervisor, _) = Supervisor::new(3, false, 1, false);
        supervisor.least_stop_grace = least;
        let actions = events.into_iter().flat_map(|event| supervisor.handle_event(Duration::ZERO, event));
        let mut arms = actions.filter_map(|action| match action {
            Action::Arm(Timer::End, grace) => Some(grace),
            _ => None,
        });
        arms.next().expect("a time limit")
    };
    let grace = |step_ms| grace_of(STOP_GRACE, step_ms);
    let long = Duration::from_secs(580);
    assert_eq!([2_000.0, 300_000.0].map(|step_ms| grace_of(long, step_ms)), [long, Duration::from_secs(900)]);
    assert_eq!(grace(2_000.0), STOP_GRACE);
    assert_eq!(grace(100_000.0), Duration::from_secs(300));
    assert_eq!(grace(f64::INFINITY), STOP_GRACE);
    assert_eq!(grace(1e22), Duration::MAX);
}

#[test]
fn a_schedulers_double_sigterm_is_one() {
    let (mut supervisor, _) = Supervisor::new(0, false, 1, false);
    let mut send = |milliseconds, signal| {
        supervisor.handle_event(Duration::from_millis(milliseconds), Event::Signal(signal))
    };
    assert!(!send(0, StopSignal::Terminate).is_empty());
    assert!(send(100, StopSignal::Terminate).is_empty());
    assert!(send(2500, StopSignal::Terminate).contains(&Action::Kill));
    let (mut supervisor, _) = Supervisor::new(0, false, 1, false);
    assert!(!supervisor.handle_event(Duration::ZERO, Event::Signal(StopSignal::Interrupt)).is_empty());
    let again = supervisor.handle_event(Duration::from_millis(300), Event::Signal(StopSignal::Interrupt));
    assert!(again.contains(&Action::Kill), "a person pressing Ctrl-C twice means it");
    // `timeout` signals the process and then its group.
    let (mut supervisor, _) = Supervisor::new(0, false, 1, false);
    supervisor.handle_event(Duration::ZERO, Event::Signal(StopSignal::Interrupt));
    let twice = supervisor.handle_event(Duration::from_millis(2), Event::Signal(StopSignal::Interrupt));
    assert_eq!(twice, []);
}

#[test]
fn a_schedulers_end_after_its_warning_is_no_impatience() {
    let warned = |more: Vec<Event>| run(3, [vec![go(), Event::Signal(StopSignal::Warning)], more].concat());
    let term = Event::Signal(StopSignal::Terminate);
    // The events of `run` come ten seconds apart.
    let actions = warned(vec![term.clone()]);
    assert!(actions.contains(&Action::RequestStop { reason: "SIGUSR1".into() }));
    assert!(!actions.contains(&Action::Kill), "preemption: SIGUSR1, then SIGTERM: {actions:?}");
    assert!(warned(vec![term.clone(), term.clone()]).contains(&Action::Kill), "SIGTERM twice");
    let again = Event::Signal(StopSignal::Warning);
    assert!(!run(3, vec![go(), term, again.clone(), again]).contains(&Action::Kill), "a late warning");
}

#[test]
fn a_machine_that_failed_twice_is_left_out_while_there_is_another() {
    let crashes = |nodes: usize, ranks: &[u32]| {
        let (mut supervisor, mut actions) = Supervisor::new(9, false, nodes, false);
        for (generation, &rank) in ranks.iter().enumerate() {
            let gathering = gathering(generation as u32);
            for event in [gathering, go(), lost(rank), KILLED, SETTLED, Event::Due(Timer::Backoff)] {
                actions.extend(supervisor.handle_event(Duration::ZERO, event));
            }
        }
        let starts = actions.iter().filter(|action| matches!(action, Action::Start { .. })).count();
        assert_eq!(starts, 1 + ranks.len());
        actions
            .into_iter()
            .filter_map(|action| match action {
                Action::LeaveOut { host } => Some(host),
                _ => None,
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(crashes(2, &[1, 0]), [""; 0], "once each");
    assert_eq!(crashes(2, &[1, 0, 1]), ["host1"]);
    assert_eq!(crashes(2, &[1, 1, 1, 0, 0]), ["host1"], "never the last one");
    assert_eq!(crashes(3, &[1, 1, 0, 0]), ["host1", "host0"]);
    assert_eq!(crashes(1, &[1, 1, 1]), [""; 0]);
}

#[test]
fn a_stop_while_waiting_to_restart_ends_at_once() {
    let actions = run(
        3,
        vec![
            go(),
            lost(1),
            KILLED,
            SETTLED,
            Event::Signal(StopSignal::Interrupt),
            Event::Due(Timer::Backoff),
        ],
    );
    assert_eq!(end(&actions), Some((PREEMPTED, None)));
}

#[test]
fn a_last_checkpoint_that_fails_is_told() {
    let stop = Event::Signal(StopSignal::Interrupt);
    let actions = run(3, vec![go(), stop, failed(1, 1), Event::Exited(Exit::Code(1)), SETTLED]);
    let Some((exit_code, culprit)) = end(&actions) else { panic!("it ends: {actions:?}") };
    assert_eq!(exit_code, PREEMPTED, "the same command continues it");
    assert!(culprit.is_some_and(|culprit| culprit.cause.contains("rank 1 says 1")));
}

#[test]
fn a_stop_of_ranks_that_are_ending_gives_them_no_more_time() {
    let actions = run(3, vec![go(), lost(1), Event::Signal(StopSignal::Interrupt)]);
    let times = actions.iter().filter(|action| matches!(action, Action::Arm(Timer::End, _))).count();
    assert_eq!(times, 1, "{actions:?}");
    assert!(!actions.iter().any(|action| matches!(action, Action::RequestStop { .. })));
}

#[test]
fn late_events_of_a_finished_run_do_nothing() {
    let mut events = vec![go(), finished(0), Event::Exited(Exit::Code(0)), SETTLED];
    let over = run(0, events.clone()).len();
    events.extend([
        lost(0),
        failed(1, 3),
        KILLED,
        SETTLED,
        Event::Signal(StopSignal::HangUp),
        Event::Due(Timer::Kill),
    ]);
    assert_eq!(run(0, events).len(), over);
}

#[test]
fn what_slurm_did_not_start_is_tried_again_and_costs_no_restart() {
    let line = "srun: error: Task launch for StepId=15.3 failed on node n2: Communication connection failure";
    let launch = LaunchFailure::of(line).expect("a launch that failed");
    assert_eq!(launch.node.as_deref(), Some("n2"));
    let controller = "srun: error: Unable to confirm allocation for job 7: Unable to contact slurm controller (connect failure)";
    assert_eq!(LaunchFailure::of(controller).expect("the controller").node, None);
    for other in [
        "error: Task launch for StepId=15.3 failed on node n2: x",
        "srun: error: n2: task 1: Killed",
        "srun: error: Unable to create step for job 15: Requested node configuration is not available",
    ] {
        assert_eq!(LaunchFailure::of(other), None, "{other}");
    }

    let (mut supervisor, _) = Supervisor::new(1, false, 2, false);
    let mut fail = |failure: &LaunchFailure| {
        supervisor.handle_event(Duration::ZERO, Event::Exited(Exit::Code(1)));
        let settled =
            Event::Settled { said: None, launch_failure: Some(failure.clone()), out_of_memory: false };
        let actions = supervisor.handle_event(Duration::ZERO, settled);
        supervisor.handle_event(Duration::ZERO, Event::Due(Timer::Backoff));
        actions
    };
    let first = fail(&launch);
    let said = "the workers on n2: not started (exit code 1): Task launch for StepId=15.3 failed on node n2: \
                Communication connection failure; another try in 5 s, which counts as no restart";
    assert!(matches!(&first[0], Action::Say(line) if line == said), "{first:?}");
    assert!(!first.iter().any(|action| matches!(action, Action::LeaveOut { .. })));
    let second = fail(&launch);
    assert!(second.contains(&Action::LeaveOut { host: "n2".into() }), "{second:?}");
    assert!(second.contains(&Action::Arm(Timer::Backoff, 2 * LAUNCH_BACKOFF)));
    let controller = LaunchFailure::of(controller).expect("the controller");
    for _ in 2..MAX_FAILED_LAUNCHES {
        assert!(fail(&controller).iter().any(|action| matches!(action, Action::Arm(Timer::Backoff, _))));
    }
    // Then they count, of which one is allowed.
    assert!(matches!(&fail(&controller)[0], Action::Say(line) if line.contains("restart 1 of 1")));
    assert!(matches!(&fail(&controller)[0], Action::Finish(outcome) if outcome.exit_code == RANK_FAILED));
}

#[test]
fn a_launch_that_failed_later_is_a_ranks_failure() {
    let (mut supervisor, _) = Supervisor::new(3, false, 2, false);
    let launch = LaunchFailure { node: Some("n2".into()), said: "x".into() };
    let mut events = |events: Vec<Event>| {
        events
            .into_iter()
            .flat_map(|event| supervisor.handle_event(Duration::ZERO, event))
            .collect::<Vec<_>>()
    };
    let settled = Event::Settled { said: None, launch_failure: Some(launch), out_of_memory: false };
    let actions = events(vec![go(), lost(1), Event::Exited(Exit::Code(1)), settled]);
    assert!(
        actions.iter().any(|action| matches!(action, Action::Say(line) if line.contains("restart 1 of 3")))
    );
}
