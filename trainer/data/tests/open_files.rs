//! More shards than the process may have open files. In a process of its own: the limit is all threads'.

mod common;

use common::Memory;
use mentee_config::recipe::DataFormat;
use mentee_data::open;
use mentee_data::shard::write_shards;

const SHARDS: u64 = 200;

#[test]
fn sets_of_more_shards_than_files_may_be_open_are_read_side_by_side() {
    let limit = libc::rlimit { rlim_cur: SHARDS / 2, rlim_max: SHARDS / 2 };
    // SAFETY: `limit` is valid and only read.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    let dir = tempfile::tempdir().unwrap();
    let source = Memory::noise(SHARDS);
    write_shards(&*source, &dir.path().join("shards"), 1, &mut |_, _| {}).unwrap();
    let sets: Vec<_> = (0..3).map(|_| open(&dir.path().join("shards"), DataFormat::Auto).unwrap()).collect();
    for set in sets {
        assert_eq!(set.stored().1, SHARDS, "a shard for each image");
        for index in 0..SHARDS {
            assert_eq!(set.read(index).unwrap().bytes, source.files[index as usize]);
        }
    }
}
