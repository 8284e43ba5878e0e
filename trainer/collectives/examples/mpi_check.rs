//! Asserts, in every rank of an MPI world, that the collectives do what they promise; also fails on purpose
//! when asked to. `tests/mpi.rs` runs it under mpirun.
//!
//! `mpi_check COMMAND [shm]`, the latter through shared memory. COMMAND: `sums | lanes | wake RANK CODE | panic RANK | panic-elsewhere RANK | leave RANK | sleep RANK | stop RANK | abort RANK CODE | expect RANK WORLD`

use std::{
    env,
    process::ExitCode,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use mentee_collectives::{
    Buffer, CollectiveError, Collectives, ErrorKind, StartError,
    checked::Checked,
    mpi::{self, Mpi},
    shm::Shm,
    threads,
};

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let number = |index: usize| args[index].parse::<u32>().expect("a number");
    let command = args.first().map(String::as_str).unwrap_or("sums");

    let expected = (command == "expect").then(|| (number(1), number(2)));
    let mpi = match Mpi::initialize(expected) {
        Ok(group) => Arc::new(group),
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    assert_eq!(Mpi::initialize(None).unwrap_err(), StartError::AlreadyStarted);
    mpi.barrier().expect("barrier");
    let group: Arc<dyn Collectives> = match args.last().map(String::as_str) {
        Some("shm") => Arc::new(Shm::over(mpi, mpi::patience).expect("MPI").expect("one machine")),
        _ => mpi,
    };

    let chosen = args.get(1).is_some_and(|rank| rank.parse() == Ok(group.rank()));
    match command {
        "sums" => {
            sums(&*group);
            broadcasts(&*group);
            gathers(&*group);
            other_threads(&*group);
            let group = Checked::new(group);
            disagreements(&group);
            group.finish().expect("finish");
            assert_eq!(group.barrier().unwrap_err().kind, ErrorKind::Finished);
            println!("rank {} of {}: all well", group.rank(), group.world_size());
            ExitCode::SUCCESS
        }
        "lanes" => {
            opposite_orders(&*group);
            busy_lanes(&*group);
            an_end_with_a_lane_in_use(&*group);
            let lane = group.lane("left over").expect("lane");
            assert_eq!(lane.finish().unwrap_err().kind, ErrorKind::OnLane);
            let checked = Checked::new(group);
            disagreement_on_a_lane(&checked);
            checked.finish().expect("finish");
            assert_eq!(lane.barrier().unwrap_err().kind, ErrorKind::Finished);
            println!("rank {} of {}: all well", checked.rank(), checked.world_size());
            ExitCode::SUCCESS
        }
        "wake" => {
            // The other ranks wait on both lines of calls when this one ends.
            let lane = group.lane("gradients").expect("lane");
            if chosen {
                thread::sleep(Duration::from_millis(200));
                group.abort(number(2) as i32);
            }
            thread::scope(|scope| {
                scope.spawn(|| lane.all_reduce_sum((&mut vec![0f32; 1_000_000]).into()));
                let _ = group.barrier();
            });
            ExitCode::FAILURE
        }
        "panic" => {
            assert!(!chosen, "a panic on purpose");
            group.barrier().map(|()| ExitCode::SUCCESS).unwrap_or(ExitCode::FAILURE)
        }
        "panic-elsewhere" => {
            // The rank's main thread is inside MPI, waiting for peers that wait for it, when another thread
            // panics.
            if chosen {
                thread::spawn(|| {
                    thread::sleep(Duration::from_millis(100));
                    panic!("a panic on purpose");
                });
                group.barrier().expect("barrier");
            } else {
                thread::sleep(Duration::from_secs(600));
            }
            group.barrier().map(|()| ExitCode::SUCCESS).unwrap_or(ExitCode::FAILURE)
        }
        "leave" => {
            if chosen {
                return ExitCode::from(3);
            }
            group.barrier().map(|()| ExitCode::SUCCESS).unwrap_or(ExitCode::FAILURE)
        }
        "sleep" => {
            // One rank never comes to the call that the others make, on a lane.
            let lane = group.lane("gradients").expect("lane");
            mpi::set_patience(Duration::from_millis(500));
            if chosen {
                thread::sleep(Duration::from_secs(600));
            }
            match lane.all_reduce_sum((&mut vec![0f32; 100_000]).into()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("error: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        "stop" => {
            // One rank is stopped in the middle of a long sum: while pieces are under way.
            mpi::set_patience(Duration::from_millis(500));
            mpi::set_last_words(|_, line| eprintln!("heard: {line}"));
            let mut values = vec![1f32; 16 << 20];
            if chosen {
                let first = values.as_ptr() as usize;
                thread::spawn(move || {
                    // SAFETY: the vector lives as long as this process; MPI writes its sum there.
                    while unsafe { (first as *const f32).read_volatile() } == 1.0 {
                        std::hint::spin_loop();
                    }
                    // SAFETY: stops this process.
                    unsafe { libc::raise(libc::SIGSTOP) };
                });
            }
            match group.all_reduce_sum((&mut values).into()) {
                Ok(()) => group.barrier().map(|()| ExitCode::SUCCESS).unwrap_or(ExitCode::FAILURE),
                Err(_) => ExitCode::FAILURE,
            }
        }
        "abort" => {
            if chosen {
                group.abort(number(2) as i32);
            }
            group.barrier().map(|()| ExitCode::SUCCESS).unwrap_or(ExitCode::FAILURE)
        }
        "expect" => {
            println!("rank {} of {}: as expected", group.rank(), group.world_size());
            group.finish().expect("finish");
            ExitCode::SUCCESS
        }
        other => panic!("no command {other}"),
    }
}

/// Values whose sums depend on the order of the additions.
fn awkward(rank: u32, index: usize) -> f64 {
    let bits = (u64::from(rank) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (index as u64).wrapping_mul(0xd134_2543_de82_ef95);
    ((bits >> 33) as f64 - 1_073_741_824.0) * 10f64.powi((bits % 13) as i32 - 6)
}

fn sums(group: &dyn Collectives) {
    let world = group.world_size();
    let in_order = |i: usize| (1..world).fold(awkward(0, i), |sum, rank| sum + awkward(rank, i));
    let in_order_f32 =
        |i: usize| (1..world).fold(awkward(0, i) as f32, |sum, rank| sum + awkward(rank, i) as f32);
    // Nothing, one element, fewer elements than ranks, both sides of the short limit, one piece, several and
    // a rest.
    for len in [0, 1, 2, 3, 5, 257, 1365, 1366, 2048, 2049, 5000, 100_003, 262_144, 600_001] {
        let mut double: Vec<f64> = (0..len).map(|i| awkward(group.rank(), i)).collect();
        let mut single: Vec<f32> = double.iter().map(|x| *x as f32).collect();
        group.all_reduce_sum((&mut double).into()).expect("f64");
        group.all_reduce_sum((&mut single).into()).expect("f32");
        for i in 0..len {
            assert_eq!(double[i].to_bits(), in_order(i).to_bits(), "f64 {i} of {len}");
            assert_eq!(single[i].to_bits(), in_order_f32(i).to_bits(), "f32 {i} of {len}");
        }
    }
    let mut counts = vec![u64::from(group.rank()) + 1; 100_000];
    group.all_reduce_sum((&mut counts).into()).expect("u64");
    assert!(counts.iter().all(|x| *x == u64::from(world * (world + 1) / 2)));
    let mut bytes = vec![1u8; 70_001];
    group.all_reduce_sum(Buffer::U8(&mut bytes)).expect("u8");
    assert!(bytes.iter().all(|x| u32::from(*x) == world));
}

fn broadcasts(group: &dyn Collectives) {
    for root in 0..group.world_size() {
        let mut values: Vec<f32> = (0..300_000).map(|i| awkward(group.rank(), i) as f32).collect();
        group.broadcast((&mut values).into(), root).expect("broadcast");
        assert!(values.iter().enumerate().all(|(i, x)| x.to_bits() == (awkward(root, i) as f32).to_bits()));
    }
    let root = group.world_size();
    let error = group.broadcast((&mut vec![0u8]).into(), root).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NoSuchRoot { root });
}

fn gathers(group: &dyn Collectives) {
    for unit in [0usize, 1, 1000] {
        let own = vec![group.rank() as u8 + 1; unit * group.rank() as usize];
        let all = group.all_gather(&own).expect("all-gather");
        assert_eq!(all.len(), group.world_size() as usize);
        for (rank, bytes) in all.iter().enumerate() {
            assert_eq!(*bytes, vec![rank as u8 + 1; unit * rank]);
        }
    }
}

/// The reducer calls from a thread of its own: the calls of several threads must not mix.
fn other_threads(group: &dyn Collectives) {
    let mut values = vec![1.0f32; 50_000];
    thread::scope(|scope| {
        scope.spawn(|| group.all_reduce_sum((&mut values).into()).expect("from another thread"));
    });
    assert!(values.iter().all(|x| *x == group.world_size() as f32));
    let error = thread::scope(|scope| scope.spawn(|| group.finish()).join().expect("no panic").unwrap_err());
    assert_eq!(error.kind, ErrorKind::WrongThread);
}

/// Rank 0 is in a call of the lane when rank 1 is in one of the group; each starts the other call only then.
fn opposite_orders(group: &dyn Collectives) {
    let lane = group.lane("gradients").expect("lane");
    for len in [1, 4000, 200_000] {
        let lane_first = group.rank().is_multiple_of(2);
        let own = f32::from(group.rank() as u16) + 1.0;
        let (mut of_lane, mut of_group) = (vec![own; len], vec![-own; len]);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(if lane_first { 0 } else { 30 }));
                lane.all_reduce_sum((&mut of_lane).into()).expect("on the lane");
            });
            thread::sleep(Duration::from_millis(if lane_first { 30 } else { 0 }));
            group.all_reduce_sum((&mut of_group).into()).expect("in the group");
        });
        let sum = (group.world_size() * (group.world_size() + 1) / 2) as f32;
        assert!(of_lane.iter().all(|x| *x == sum) && of_group.iter().all(|x| *x == -sum));
    }
}

/// What one line of calls does; the results decide which bits went where.
fn mixed_calls(line: &dyn Collectives, salt: usize) -> Result<Vec<u64>, CollectiveError> {
    let (rank, world) = (line.rank(), line.world_size());
    let mut seen = Vec::new();
    for (round, len) in [1, 700, 33_000, 5, 300_001, 1500, 70_000].into_iter().enumerate() {
        let mut double: Vec<f64> = (0..len).map(|i| awkward(rank, i + salt)).collect();
        let mut single: Vec<f32> = double.iter().map(|x| *x as f32).collect();
        line.all_reduce_sum((&mut single).into())?;
        line.all_reduce_sum((&mut double).into())?;
        let root = (round + salt) as u32 % world;
        let mut word = [u64::from(rank), salt as u64];
        line.broadcast(Buffer::U64(&mut word), root)?;
        let all = line.all_gather(&vec![salt as u8; rank as usize + round])?;
        line.barrier()?;
        seen.extend(double.iter().map(|x| x.to_bits()));
        seen.extend(single.iter().map(|x| u64::from(x.to_bits())));
        seen.extend(word);
        seen.extend(all.iter().flatten().map(|x| u64::from(*x)));
    }
    Ok(seen)
}

/// Three lines of calls at once, each from its own thread; the same bits as threads of one process get.
fn busy_lanes(group: &dyn Collectives) {
    let lanes = [group.lane("one").expect("lane"), group.lane("two").expect("lane")];
    let (of_group, of_lanes) = thread::scope(|scope| {
        let others: Vec<_> = lanes
            .iter()
            .enumerate()
            .map(|(index, lane)| scope.spawn(move || mixed_calls(lane, index + 1).expect("on a lane")))
            .collect();
        let own = mixed_calls(group, 0).expect("in the group");
        (own, others.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>())
    });
    let expected = threads::run(group.world_size(), Duration::from_secs(60), |rank| {
        let lanes = [rank.lane("one").expect("lane"), rank.lane("two").expect("lane")];
        [
            mixed_calls(&rank, 0).expect("threads"),
            mixed_calls(&lanes[0], 1).expect("threads"),
            mixed_calls(&lanes[1], 2).expect("threads"),
        ]
    });
    let rank = group.rank() as usize;
    assert!(of_group == expected[rank][0], "other bits than among threads");
    assert!(of_lanes == expected[rank][1..], "other bits on lanes than among threads");
}

/// The end is refused while a lane is at work, and can be asked for again.
fn an_end_with_a_lane_in_use(group: &dyn Collectives) {
    if group.world_size() == 1 {
        return;
    }
    let lane = group.lane("slow").expect("lane");
    if group.rank() == 0 {
        thread::scope(|scope| {
            let (started, wait_for_start) = mpsc::channel();
            let lane = &lane;
            scope.spawn(move || {
                started.send(()).expect("a listener");
                lane.barrier().expect("on the lane");
            });
            wait_for_start.recv().expect("a start");
            // The others come to that barrier only after the one of the group.
            thread::sleep(Duration::from_millis(100));
            assert_eq!(group.finish().unwrap_err().kind, ErrorKind::LaneInUse { lane: "slow".into() });
            group.barrier().expect("in the group");
        });
    } else {
        group.barrier().expect("in the group");
        lane.barrier().expect("on the lane");
    }
}

fn disagreement_on_a_lane(group: &Checked<Arc<dyn Collectives>>) {
    let lane = group.lane("gradients").expect("lane");
    lane.barrier().expect("the same call");
    let result =
        if group.rank() == 1 { lane.barrier() } else { lane.all_reduce_sum((&mut vec![0f64; 3]).into()) };
    if group.world_size() == 1 {
        result.expect("alone");
        return;
    }
    let text = result.unwrap_err().to_string();
    assert!(text.contains("(call 1 on lane gradients) failed on rank"), "{text}");
    assert!(
        text.ends_with("rank 0 calls all-reduce of 3 f64 as its call 1, rank 1 calls barrier as its call 1"),
        "{text}"
    );
}

fn disagreements(group: &Checked<Arc<dyn Collectives>>) {
    let len = if group.rank() == 1 { 9 } else { 8 };
    let result = group.all_reduce_sum((&mut vec![0f32; len]).into());
    if group.world_size() == 1 {
        result.expect("alone");
        return;
    }
    let text = result.unwrap_err().to_string();
    let expected =
        "rank 0 calls all-reduce of 8 f32 as its call 0, rank 1 calls all-reduce of 9 f32 as its call 0";
    assert!(text.ends_with(expected), "{text}");
}
