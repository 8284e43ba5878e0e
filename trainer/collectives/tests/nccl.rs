//! The NCCL backend against `fake_nccl.cpp`: a library with NCCL's face that sums in host memory among threads, and goes
//! wrong on request. Every test loads a copy of its own, so that they do not see one another.

use std::{
    env,
    ffi::{CString, c_char, c_int, c_long, c_void},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mentee_collectives::{
    Collectives, DeviceBuffer, DeviceCollectives, DeviceError, DeviceErrorKind, DeviceType, Event,
    EventError, Record, RecordState, Single, Stream, Ticket,
    nccl::{Communicator, Found, Library, LibraryError, Options, Search, Version},
    threads,
};

/// Longer than anything here takes, shorter than one likes to wait for a test.
const LIMIT: Duration = Duration::from_secs(30);
/// What a test that expects to run out of patience waits.
const SHORT: Duration = Duration::from_millis(300);

/// A copy of the fake.
#[derive(Clone, Copy)]
struct Fake {
    folder: &'static Path,
    set: unsafe extern "C" fn(*const c_char, c_long),
    get: unsafe extern "C" fn(*const c_char) -> c_long,
    stream: unsafe extern "C" fn() -> *mut c_void,
    record: unsafe extern "C" fn(*mut c_void) -> u64,
    passed: unsafe extern "C" fn(*mut c_void, u64) -> c_int,
}

/// Compiles the fake, once for all tests that need it in this form.
fn compiled(name: &str, flags: &[&str]) -> PathBuf {
    let folder =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fake-nccl-{}-{name}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for the fake");
    let library = folder.join("libnccl.so.2");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_nccl.cpp");
    let output = Command::new(env::var_os("CXX").unwrap_or_else(|| "c++".into()))
        .args([
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-pthread",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
        ])
        .args(["-Werror", "-o"])
        .arg(&library)
        .args(flags)
        .arg(source)
        .output()
        .expect("a C++ compiler, c++ or what CXX names");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

/// A folder with a copy of the fake in it.
fn copy() -> &'static Path {
    static COMPILED: OnceLock<PathBuf> = OnceLock::new();
    static COPIES: AtomicU32 = AtomicU32::new(0);
    let library = COMPILED.get_or_init(|| compiled("plain", &[]));
    let number = COPIES.fetch_add(1, Ordering::SeqCst).to_string();
    let folder = library.parent().expect("a folder").join(number);
    fs::create_dir_all(&folder).expect("a folder for the copy");
    fs::copy(library, folder.join("libnccl.so.2")).expect("the copy");
    Box::leak(folder.into_boxed_path())
}

fn fake() -> Fake {
    fake_in(copy())
}

fn fake_in(folder: &'static Path) -> Fake {
    // SAFETY: the fake has no initialisers to speak of; its functions have the types given here; it is never closed.
    unsafe {
        let library = libloading::Library::new(folder.join("libnccl.so.2")).expect("the fake");
        let library = Box::leak(Box::new(library));
        Fake {
            folder,
            set: *library.get(b"fake_set\0").expect("fake_set"),
            get: *library.get(b"fake_get\0").expect("fake_get"),
            stream: *library.get(b"fake_stream\0").expect("fake_stream"),
            record: *library.get(b"fake_record\0").expect("fake_record"),
            passed: *library.get(b"fake_passed\0").expect("fake_passed"),
        }
    }
}

impl Fake {
    fn set(self, knob: &str, value: i64) -> Fake {
        let knob = CString::new(knob).expect("a name");
        // SAFETY: reads the string before it returns.
        unsafe { (self.set)(knob.as_ptr(), value) };
        self
    }

    fn get(self, knob: &str) -> i64 {
        let knob = CString::new(knob).expect("a name");
        // SAFETY: as above.
        unsafe { (self.get)(knob.as_ptr()) }
    }

    fn search(self) -> Search {
        Search { folders: vec![self.folder.to_owned()], ..Search::default() }
    }

    fn library(self) -> Result<Arc<Library>, LibraryError> {
        Library::open_by(&self.search()).map(Arc::new)
    }

    fn stream(self) -> FakeStream {
        // SAFETY: makes a stream, which is never freed.
        FakeStream { fake: self, handle: unsafe { (self.stream)() } }
    }

    fn start(self, host: impl Collectives + 'static, options: Options) -> Result<Communicator, DeviceError> {
        Communicator::start(self.library(), Arc::new(host), options)
    }

    /// Runs `body` on every rank of a group, and makes sure that nobody broke NCCL's rules.
    fn world<R: Send>(
        self,
        ranks: u32,
        options: &Options,
        body: impl Fn(Communicator) -> R + Send + Sync,
    ) -> Vec<R> {
        let results = threads::run(ranks, LIMIT, |host| {
            body(self.start(host, options.clone()).unwrap_or_else(|error| panic!("{error}")))
        });
        assert_eq!(self.get("violations"), 0);
        results
    }
}

#[derive(Clone, Copy)]
struct FakeStream {
    fake: Fake,
    handle: *mut c_void,
}

// SAFETY: atomic counters in a place that is never freed.
unsafe impl Send for FakeStream {}
// SAFETY: as above.
unsafe impl Sync for FakeStream {}

impl FakeStream {
    fn raw(&self) -> Stream {
        // SAFETY: the fake's streams are never freed.
        unsafe { Stream::from_raw(self.handle) }
    }

    fn record(&self) -> FakeEvent {
        // SAFETY: a stream of the fake.
        FakeEvent { stream: *self, point: unsafe { (self.fake.record)(self.handle) } }
    }
}

struct FakeEvent {
    stream: FakeStream,
    point: u64,
}

impl Event for FakeEvent {
    fn is_complete(&self) -> Result<bool, EventError> {
        // SAFETY: a stream of the fake.
        Ok(unsafe { (self.stream.fake.passed)(self.stream.handle, self.point) } != 0)
    }
}

/// Names memory of the host as memory of the fake's device. The vectors of these tests outlive what is done to them.
fn device<T>(values: &mut [T], element: DeviceType) -> DeviceBuffer {
    // SAFETY: the callers leave the values alone until the stream has passed.
    unsafe { DeviceBuffer::new(values.as_mut_ptr().cast(), values.len(), element) }
}

fn quick() -> Options {
    Options { start_patience: LIMIT, call_patience: LIMIT, abort_patience: LIMIT, exit_code: 1 }
}

/// Memory that is there until the end, for operations that may never be complete.
fn lasting(len: usize) -> &'static mut [f32] {
    Box::leak(vec![1f32; len].into_boxed_slice())
}

/// Sums `values` over the ranks and waits for it.
fn sum(group: &dyn DeviceCollectives, stream: FakeStream, values: &mut [f32]) -> Result<Ticket, DeviceError> {
    let ticket = group.all_reduce_sum(device(values, DeviceType::F32), stream.raw())?;
    group.wait(ticket, &stream.record(), LIMIT).map(|()| ticket)
}

/// Replaces every age, which depends on the day, by "AGE".
fn ageless(text: &str) -> String {
    let mut words: Vec<&str> = text.split(' ').collect();
    for at in 1..words.len() {
        if matches!(words[at], "s" | "s;") && words[at - 1].parse::<f64>().is_ok() {
            words[at - 1] = "AGE";
        }
    }
    words.join(" ")
}

#[test]
fn ranks_sum_and_copy_in_all_types() {
    for ranks in [1u32, 2, 3] {
        let fake = fake();
        fake.world(ranks, &quick(), |group| {
            let (stream, rank) = (fake.stream(), group.rank());
            assert_eq!((group.world_size(), group.library().found()), (ranks, Found::Folder));
            let total = (0..ranks).sum::<u32>();
            let mut single: Vec<f32> = (0..1000).map(|index| (rank * 1000 + index) as f32).collect();
            let mut double = vec![f64::from(rank) + 0.5; 3];
            // 1 + rank in bfloat16: the upper half of an f32.
            let mut half = vec![((1.0 + rank as f32).to_bits() >> 16) as u16; 5];
            group.all_reduce_sum(device(&mut single, DeviceType::F32), stream.raw()).unwrap();
            group.all_reduce_sum(device(&mut double, DeviceType::F64), stream.raw()).unwrap();
            let ticket = group.all_reduce_sum(device(&mut half, DeviceType::Bf16), stream.raw()).unwrap();
            assert_eq!(ticket.number(), 2);
            group.wait(ticket, &stream.record(), LIMIT).unwrap();
            let expected: Vec<f32> = (0..1000).map(|index| (total * 1000 + ranks * index) as f32).collect();
            assert_eq!(single, expected);
            assert_eq!(double, [f64::from(total) + 0.5 * f64::from(ranks); 3]);
            assert_eq!(half, [(((total + ranks) as f32).to_bits() >> 16) as u16; 5]);

            let root = ranks - 1;
            let mut values = vec![f64::from(rank); 4];
            let ticket = group.broadcast(device(&mut values, DeviceType::F64), root, stream.raw()).unwrap();
            group.wait(ticket, &stream.record(), LIMIT).unwrap();
            assert_eq!(values, [f64::from(root); 4]);
            let nothing =
                group.all_reduce_sum(device::<f32>(&mut [], DeviceType::F32), stream.raw()).unwrap();
            group.wait(nothing, &stream.record(), LIMIT).unwrap();

            group.check().unwrap();
            group.finish().unwrap();
        });
        assert_eq!(fake.get("destroys"), i64::from(ranks));
        assert_eq!(fake.get("aborts"), 0);
    }
}

#[test]
fn what_takes_time_is_asked_for_until_it_is_through() {
    let fake = fake().set("init_polls", 500).set("op_polls", 300).set("finalize_polls", 300);
    fake.world(2, &quick(), |group| {
        let stream = fake.stream();
        for round in 0..3u8 {
            let mut values = [f32::from(round); 7];
            sum(&group, stream, &mut values).unwrap();
            assert_eq!(values, [2.0 * f32::from(round); 7]);
        }
        group.finish().unwrap();
    });
    assert_eq!(fake.get("destroys"), 2);
}

#[test]
fn every_version_accepts_the_configuration() {
    for version in [21801, 21903, 22005, 22105, 22203, 22304, 22403, 22501, 22605, 22707, 22809, 22907, 23007]
    {
        let fake = fake().set("version", version);
        fake.world(2, &quick(), |group| {
            assert_eq!(group.library().version(), Version(version as i32));
            group.finish().unwrap();
        });
        assert_eq!(fake.get("destroys"), 2, "{version}");
    }
}

#[test]
fn lanes_work_at_the_same_time_and_nobody_meets_inside() {
    let fake = fake().set("op_polls", 2).set("dwell_us", 20);
    fake.world(2, &quick(), |group| {
        let lane = group.lane("gradients").unwrap();
        let rounds = |group: &dyn DeviceCollectives, len: usize| {
            let stream = fake.stream();
            for round in 0..60u8 {
                let mut values = vec![f32::from(round) + group.rank() as f32; len];
                sum(group, stream, &mut values).unwrap();
                assert!(values.iter().all(|&value| value == 2.0 * f32::from(round) + 1.0), "{values:?}");
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| rounds(lane.as_ref(), 1000));
            rounds(&group, 10);
        });
        assert!(matches!(lane.finish().unwrap_err().kind, DeviceErrorKind::OnLane));
        group.finish().unwrap();
        assert!(matches!(lane.check().unwrap_err().kind, DeviceErrorKind::Finished));
        let error = sum(lane.as_ref(), fake.stream(), &mut [1.0]).unwrap_err().to_string();
        let expected = "all-reduce 60 of 1 f32 on lane gradients failed on rank ";
        assert!(error.starts_with(expected) && error.contains(": the group was shut down before"), "{error}");
        // After the end there is nothing to abort, and the error stays what it was.
        group.abort(1).unwrap();
        assert!(matches!(group.finish().unwrap_err().kind, DeviceErrorKind::Finished));
    });
    assert_eq!((fake.get("starts"), fake.get("destroys"), fake.get("aborts")), (4, 4, 0));
}

#[test]
fn different_lanes_are_named() {
    let fake = fake();
    let errors = fake.world(2, &quick(), |group| {
        let name = if group.rank() == 0 { "gradients" } else { "statistics" };
        group.lane(name).err().map(|error| error.to_string())
    });
    let expected = |lane: &str, rank: u32| {
        format!(
            "lane {lane} failed on rank {rank} of 2: rank 0 opens lane gradients, rank 1 opens lane statistics"
        )
    };
    assert_eq!(errors, [Some(expected("gradients", 0)), Some(expected("statistics", 1))]);
}

#[test]
fn a_start_that_hangs_ends_in_time_and_is_undone() {
    let fake = fake().set("init_polls", -1);
    let began = Instant::now();
    let errors = threads::run(2, LIMIT, |host| {
        let options = Options { start_patience: SHORT, ..quick() };
        fake.start(host, options).map(|_| ()).unwrap_err().to_string()
    });
    for (rank, error) in errors.iter().enumerate() {
        let expected = format!(
            "NCCL's start failed on rank {rank} of 2: ncclCommInitRankConfig still in progress after AGE s; see in the \
             logs of the other ranks where they are"
        );
        assert_eq!(ageless(error), expected);
    }
    assert!(began.elapsed() >= SHORT && began.elapsed() < LIMIT / 2);
    assert_eq!((fake.get("aborts"), fake.get("violations")), (2, 0));
}

#[test]
fn a_call_that_hangs_says_so() {
    let fake = fake();
    let errors = fake.world(2, &Options { call_patience: SHORT, ..quick() }, |group| {
        group.lane("gradients").unwrap();
        fake.set("op_polls", -1);
        let mut values = vec![1f32; 12_345];
        let error =
            group.all_reduce_sum(device(&mut values, DeviceType::F32), fake.stream().raw()).unwrap_err();
        group.abort(1).unwrap();
        ageless(&error.to_string())
    });
    for (rank, error) in errors.iter().enumerate() {
        assert_eq!(
            *error,
            format!(
                "all-reduce 0 of 12,345 f32 failed on rank {rank} of 2: ncclAllReduce still in progress after AGE s; \
                 see in the logs of the other ranks where they are; rank {rank}: all-reduce 0 of 12,345 f32 called \
                 AGE s ago, not on the stream yet"
            )
        );
    }
}

#[test]
fn a_hang_report_names_what_is_not_complete() {
    let fake = fake().set("hang_clique", 1).set("hang_at", 117);
    let reports = fake.world(2, &quick(), |group| {
        let (stream, bucket) = (fake.stream(), lasting(2_359_296));
        sum(&group, fake.stream(), &mut [1.0]).unwrap();
        let lane = group.lane("gradients").unwrap();
        let mut last = None;
        for number in 0..120 {
            let len = if number == 117 { bucket.len() } else { 1000 };
            let buffer = device(&mut bucket[..len], DeviceType::F32);
            let ticket = lane.all_reduce_sum(buffer, stream.raw()).unwrap();
            let event = Arc::new(stream.record());
            lane.watch(ticket, event.clone());
            last = Some((ticket, event));
        }
        let (ticket, event) = last.unwrap();
        let began = Instant::now();
        // The other rank's, too: one sum on the group and 120 on the lane each.
        while fake.get("calls") < 2 * 121 {
            assert!(began.elapsed() < LIMIT);
            thread::yield_now();
        }
        let error = lane.wait(ticket, event.as_ref(), SHORT).unwrap_err();
        assert!(matches!(error.kind, DeviceErrorKind::NotComplete { waited } if waited >= SHORT), "{error}");

        // The lane's ring: its last 64 operations, and how far they are. The group's one sum is in a ring of its own.
        let mut records = group.records();
        assert_eq!(records.len(), 65);
        assert!(records.remove(0).lane.is_none());
        let numbers: Vec<u64> = records.iter().map(|record| record.number).collect();
        assert_eq!(numbers, (56..120).collect::<Vec<_>>());
        let complete = |record: &Record| matches!(record.state, RecordState::Complete(_));
        assert!(records.iter().all(|record| complete(record) == (record.number < 117)));
        assert!(records.iter().all(|record| record.lane.as_deref() == Some("gradients")));
        group.abort(1).unwrap();
        ageless(&error.to_string())
    });
    for (rank, report) in reports.iter().enumerate() {
        assert_eq!(
            *report,
            format!(
                "all-reduce 119 of 1,000 f32 on lane gradients failed on rank {rank} of 2: not complete after AGE s; \
                 rank {rank}: all-reduce 117 of 2,359,296 f32 on lane gradients enqueued AGE s ago, not complete \
                 (2 behind it, all-reduce 116 seen complete AGE s ago)"
            )
        );
    }
}

#[test]
fn an_error_of_the_network_ends_the_wait() {
    let fake = fake().set("hang_at", 0);
    let errors = fake.world(2, &quick(), |group| {
        let (stream, rank) = (fake.stream(), group.rank());
        let ticket = group.all_reduce_sum(device(lasting(3), DeviceType::F32), stream.raw()).unwrap();
        // On rank 1 only, and while it waits; rank 0 hears of it by other means, here by running out of patience.
        let meanwhile = thread::spawn(move || {
            thread::sleep(SHORT / 3);
            fake.set("async_rank", 1).set("async_error", 6);
        });
        let patience = if rank == 1 { LIMIT } else { SHORT };
        let error = group.wait(ticket, &stream.record(), patience).unwrap_err();
        meanwhile.join().unwrap();
        if rank == 1 {
            assert!(matches!(group.check().unwrap_err().kind, DeviceErrorKind::Asynchronous { .. }));
        }
        group.abort(1).unwrap();
        assert!(matches!(group.check().unwrap_err().kind, DeviceErrorKind::Aborted));
        ageless(&error.to_string())
    });
    let open = |rank: u32| format!("rank {rank}: all-reduce 0 of 3 f32 enqueued AGE s ago, not complete");
    assert_eq!(
        errors,
        [
            format!("all-reduce 0 of 3 f32 failed on rank 0 of 2: not complete after AGE s; {}", open(0)),
            format!(
                "all-reduce 0 of 3 f32 failed on rank 1 of 2: NCCL reports on the group: remote process exited or there \
                 was a network error (6): NET/Socket : Connection closed by remote peer; {}",
                open(1)
            )
        ]
    );
}

#[test]
fn a_refused_call_says_why() {
    let fake = fake();
    let errors = fake.world(1, &quick(), |group| {
        fake.set("call_error", 5);
        let error = sum(&group, fake.stream(), &mut [1.0; 2]).unwrap_err();
        group.abort(1).unwrap();
        assert_eq!(
            group.broadcast(device(&mut [1f32], DeviceType::F32), 1, fake.stream().raw()).unwrap_err().kind,
            DeviceErrorKind::NoSuchRoot { root: 1 }
        );
        ageless(&error.to_string())
    });
    assert_eq!(
        errors,
        [
            "all-reduce 0 of 2 f32 failed on rank 0 of 1: ncclAllReduce: invalid usage (5): asked for by a test; rank 0: \
          all-reduce 0 of 2 f32 called AGE s ago, not on the stream yet"
        ]
    );
}

#[test]
fn a_failing_device_ends_the_wait() {
    struct Broken;
    impl Event for Broken {
        fn is_complete(&self) -> Result<bool, EventError> {
            Err(EventError("an illegal memory access was encountered".to_owned()))
        }
    }
    let fake = fake();
    let errors = fake.world(1, &quick(), |group| {
        let ticket = sum(&group, fake.stream(), &mut [1.0]).unwrap();
        let error = group.wait(ticket, &Broken, LIMIT).unwrap_err().to_string();
        group.abort(1).unwrap();
        error
    });
    assert_eq!(
        errors,
        [
            "all-reduce 0 of 1 f32 failed on rank 0 of 1: the device reports: an illegal memory access was encountered"
        ]
    );
}

#[test]
fn abort_wakes_a_thread_that_waits_and_voids_the_result() {
    let fake = fake().set("hang_at", 0);
    fake.world(2, &quick(), |group| {
        let lane = group.lane("gradients").unwrap();
        let (stream, values) = (fake.stream(), lasting(4));
        let ticket = lane.all_reduce_sum(device(values, DeviceType::F32), stream.raw()).unwrap();
        let event = stream.record();
        let began = Instant::now();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| lane.wait(ticket, &event, LIMIT).unwrap_err());
            thread::sleep(SHORT);
            assert!(!waiting.is_finished());
            group.abort(1).unwrap();
            // The kernel has left the stream, but not with a sum.
            assert_eq!(event.is_complete(), Ok(true));
            let error = waiting.join().unwrap();
            assert_eq!(error.kind, DeviceErrorKind::Aborted);
            assert!(
                error.to_string().contains("all-reduce 0 of 4 f32 on lane gradients enqueued"),
                "{error}"
            );
        });
        assert!(began.elapsed() < LIMIT / 2);
        assert_eq!(*values, [1.0; 4]);
        // As often as one likes, and nothing works any more.
        lane.abort(1).unwrap();
        group.abort(1).unwrap();
        assert_eq!(lane.wait(ticket, &event, LIMIT).unwrap_err().kind, DeviceErrorKind::Aborted);
        assert_eq!(group.finish().unwrap_err().kind, DeviceErrorKind::Aborted);
        assert_eq!(sum(&group, stream, values).unwrap_err().kind, DeviceErrorKind::Aborted);
        assert_eq!(lane.lane("another").err().map(|error| error.kind), Some(DeviceErrorKind::Aborted));
    });
    assert_eq!(fake.get("aborts"), 4);
}

#[test]
fn lanes_are_told_to_stop_before_any_is_waited_for() {
    // What hangs on each lane would keep the device from being freed for the other.
    let fake = fake().set("hang_at", 0);
    fake.world(2, &quick(), |group| {
        let lanes = [group.lane("gradients").unwrap(), group.lane("statistics").unwrap()];

        for lane in &lanes {
            lane.all_reduce_sum(device(lasting(4), DeviceType::F32), fake.stream().raw()).unwrap();
        }
        group.abort(1).unwrap();
    });
    assert_eq!((fake.get("together"), fake.get("aborts")), (6, 6));
}

#[test]
fn a_thread_that_is_stuck_inside_keeps_nobody_else_waiting() {
    let fake = fake().set("hang_at", 0);
    fake.world(1, &Options { call_patience: SHORT, ..quick() }, |group| {
        let lane = group.lane("statistics").unwrap();
        let stream = fake.stream();
        let ticket = group.all_reduce_sum(device(lasting(4), DeviceType::F32), stream.raw()).unwrap();
        let event = stream.record();
        fake.set("gate", 1);
        thread::scope(|scope| {
            let stuck = scope.spawn(|| group.check());
            while fake.get("inside") == 0 {
                thread::yield_now();
            }
            let error = lane.all_reduce_sum(device(lasting(4), DeviceType::F32), stream.raw()).unwrap_err();
            assert!(matches!(error.kind, DeviceErrorKind::Stuck { waited } if waited >= SHORT), "{error}");
            let error = group.wait(ticket, &event, SHORT).unwrap_err();
            assert!(matches!(error.kind, DeviceErrorKind::NotComplete { .. }), "{error}");
            assert!(!stuck.is_finished());
            fake.set("gate", 0);
            stuck.join().unwrap().unwrap();
        });
        group.abort(1).unwrap();
    });
}

/// In a process of its own, which is this test over again: it ends there, in one of two ways.
#[test]
fn an_abort_that_hangs_ends_the_process() {
    const VARIABLES: [&str; 2] = ["MENTEE_TEST_ABORT", "MENTEE_TEST_FAKE"];
    if let [Ok(way), Ok(folder)] = VARIABLES.map(env::var) {
        let fake = fake_in(Box::leak(PathBuf::from(folder).into_boxed_path())).set("hang_at", 0);
        let options = Options { abort_patience: SHORT, ..quick() };
        let group = fake.start(Single::new(), options).expect("a group");
        let stream = fake.stream();
        group.all_reduce_sum(device(lasting(1000), DeviceType::F32), stream.raw()).expect("on the stream");
        let group = Arc::new(group);
        if way == "abort" {
            fake.set("abort_hangs", 1);
        } else {
            // Another thread does not come back from a call.
            fake.set("gate", 1);
            let theirs = Arc::clone(&group);
            thread::spawn(move || theirs.check());
            while fake.get("inside") == 0 {
                thread::yield_now();
            }
        }
        let returned = group.abort(75);
        unreachable!("abort returned {returned:?}");
    }
    for way in ["abort", "call"] {
        let began = Instant::now();
        let mut child = Command::new(env::current_exe().expect("this test's path"))
            .args(["--exact", "an_abort_that_hangs_ends_the_process", "--nocapture"])
            .env(VARIABLES[0], way)
            .env(VARIABLES[1], copy())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("this test once more");
        while child.try_wait().expect("wait").is_none() {
            if began.elapsed() > LIMIT {
                child.kill().expect("kill");
            }
            thread::sleep(Duration::from_millis(10));
        }
        let output = child.wait_with_output().expect("its last words");
        let stderr = ageless(&String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(75), "{way}: {stderr}");
        let expected = "error: rank 0 of 1: ncclCommAbort does not return after AGE s; ending this process; rank 0: \
                        all-reduce 0 of 1,000 f32 enqueued AGE s ago, the last";
        assert!(stderr.lines().any(|line| line == expected), "{way}: {stderr}");
        assert!(began.elapsed() < LIMIT, "{way}");
    }
}

#[test]
fn ranks_with_different_versions_are_told_apart() {
    let fakes = [fake(), fake(), fake().set("version", 22105)];
    let errors = threads::run(3, LIMIT, |host| {
        let fake = fakes[host.rank() as usize];
        fake.start(host, quick()).map(|_| ()).unwrap_err().to_string()
    });
    for (rank, error) in errors.iter().enumerate() {
        assert_eq!(
            *error,
            format!(
                "NCCL's start failed on rank {rank} of 3: rank 0 has NCCL 2.28.9, rank 2 has NCCL 2.21.5; let all ranks \
                 load the same library, see MENTEE_NCCL"
            )
        );
    }
    assert!(fakes.iter().all(|fake| fake.get("starts") == 0));
}

#[test]
fn a_rank_without_a_library_tells_all_at_once() {
    let fake = fake();
    let began = Instant::now();
    let errors = threads::run(3, LIMIT, |host| {
        let library = if host.rank() == 1 {
            Library::open_by(&Search::default()).map(Arc::new)
        } else {
            fake.library()
        };
        Communicator::start(library, Arc::new(host), quick()).map(|_| ()).unwrap_err().to_string()
    });
    let reason = "no NCCL library: tried MENTEE_NCCL (not set); set MENTEE_NCCL to the path of a libnccl.so.2, 2.18.0 or newer";
    assert_eq!(errors[1], format!("NCCL's start failed on rank 1 of 3: {reason}"));
    for rank in [0, 2] {
        assert_eq!(
            errors[rank],
            format!("NCCL's start failed on rank {rank} of 3: rank 1 cannot take part: {reason}")
        );
    }
    assert!(began.elapsed() < LIMIT / 2);
}

#[test]
fn a_group_that_is_dropped_neither_waits_nor_frees() {
    let fake = fake().set("hang_at", 0);
    fake.world(2, &quick(), |group| {
        group.all_reduce_sum(device(lasting(4), DeviceType::F32), fake.stream().raw()).unwrap();
    });
    assert_eq!((fake.get("calls"), fake.get("destroys"), fake.get("aborts")), (2, 0, 0));
}

#[test]
fn libraries_that_cannot_be_used_are_refused() {
    let old = fake().set("version", 21701);
    let path = old.folder.join("libnccl.so.2");
    let expected = format!("{}: NCCL 2.17.1 is too old; 2.18.0 or newer is needed", path.display());
    assert_eq!(old.library().unwrap_err().to_string(), expected);

    // A library, but not NCCL: the one that is in every process.
    let libc = Search { file: Some("libc.so.6".into()), ..Search::default() };
    let error = Library::open_by(&libc).unwrap_err();
    assert!(matches!(error, LibraryError::Missing { function: "ncclGetVersion", .. }), "{error}");

    // The user's own choice is not passed over.
    let named = PathBuf::from("/nowhere/libnccl.so.2");
    let search = Search { file: Some(named), ..fake().search() };
    let error = Library::open_by(&search).unwrap_err().to_string();
    assert!(error.starts_with("MENTEE_NCCL=/nowhere/libnccl.so.2: "), "{error}");
    assert!(error.ends_with("; let it name a libnccl.so.2, 2.18.0 or newer"), "{error}");

    // A file that is no library does not keep the next folder from being tried.
    let (bad, good) = (copy(), fake());
    fs::write(bad.join("libnccl.so.2"), "not a library").expect("written");
    let folders = vec![bad.to_owned(), good.folder.to_owned()];
    let library = Library::open_by(&Search { folders, ..Search::default() }).unwrap();
    assert_eq!(library.path(), good.folder.join("libnccl.so.2"));
    assert_eq!(
        library.to_string(),
        format!("NCCL 2.28.9, {} (found beside libtorch)", library.path().display())
    );
}

#[test]
fn the_copy_in_the_process_comes_first() {
    let other = fake();
    let search = Search { in_process: true, ..Search::default() };
    let nowhere = Search { folders: vec!["/nowhere".into()], ..search.clone() };
    assert_eq!(
        Library::open_by(&nowhere).unwrap_err().to_string(),
        "no NCCL library: tried libnccl.so.2 in this process (not loaded), MENTEE_NCCL (not set), \
         /nowhere/libnccl.so.2 (no such file); set MENTEE_NCCL to the path of a libnccl.so.2, 2.18.0 or newer"
    );
    // As libtorch's: loaded by its path, known to the loader by the name inside it.
    let loaded = compiled("soname", &["-Wl,-soname,libnccl.so.2"]);
    let loaded = fake_in(Box::leak(loaded.parent().expect("a folder").to_owned().into_boxed_path()));
    loaded.set("version", 22907);
    let file = Some(other.folder.join("libnccl.so.2"));
    let library = Library::open_by(&Search { file, ..search }).unwrap();
    assert_eq!(library.path(), loaded.folder.join("libnccl.so.2"));
    assert_eq!((library.found(), library.version()), (Found::InProcess, Version(22907)));
}
