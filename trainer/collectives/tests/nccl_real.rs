//! NVIDIA's own NCCL, in a process of its own: the tests in `nccl.rs` must not find it loaded.

use std::{io::Write, sync::Arc, time::Duration};

use mentee_collectives::{
    DeviceCollectives, DeviceErrorKind, Single,
    nccl::{Communicator, Found, Library, Options, Search},
};

/// Longer than anything here takes, shorter than one likes to wait for a test.
const LIMIT: Duration = Duration::from_secs(30);

/// With a device the group of one starts and ends, without one the error is the library's.
#[test]
#[cfg_attr(
    not(real_nccl),
    ignore = "needs NVIDIA's libnccl.so.2: ci/setup --python, or MENTEE_NCCL when the tests are built"
)]
fn the_real_library() {
    let search = Search { file: Some(env!("MENTEE_REAL_NCCL").into()), ..Search::default() };
    let library = Arc::new(Library::open_by(&search).unwrap_or_else(|error| panic!("{error}")));
    let _ = writeln!(std::io::stderr(), "{library}");
    assert_eq!(library.found(), Found::Variable);
    let options =
        Options { start_patience: LIMIT, call_patience: LIMIT, abort_patience: LIMIT, exit_code: 1 };
    match Communicator::start(Ok(library), Arc::new(Single::new()), options) {
        Ok(group) => {
            group.check().unwrap();
            let lane = group.lane("gradients").unwrap();
            lane.check().unwrap();
            group.finish().unwrap();
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error}");
            assert!(
                matches!(
                    error.kind,
                    DeviceErrorKind::Call { function: "ncclCommInitRankConfig", code: 1, .. }
                ),
                "{error}"
            );
        }
    }
}
