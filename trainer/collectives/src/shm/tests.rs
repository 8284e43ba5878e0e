use std::{
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::threads::{self, ThreadRank};

const PATIENCE: Duration = Duration::from_secs(60);

fn shared(rank: ThreadRank) -> Shm {
    Shm::over(Arc::new(rank), || PATIENCE).unwrap().unwrap()
}

/// Runs `body` once per rank of a group that shares memory.
fn run<R: Send>(world_size: u32, body: impl Fn(Shm) -> R + Send + Sync) -> Vec<R> {
    threads::run(world_size, PATIENCE, |rank| body(shared(rank)))
}

/// Values whose sum depends on the order of the additions.
fn values(rank: u32, len: usize) -> Vec<f32> {
    let value = |i: usize| ((rank as usize * 7919 + i * 31) % 1009) as f32 * 10f32.powi((i % 13) as i32 - 6);
    (0..len).map(value).collect()
}

fn sum_of_values(world_size: u32, len: usize) -> Vec<f32> {
    let all: Vec<Vec<f32>> = (0..world_size).map(|rank| values(rank, len)).collect();
    let mut sum = vec![0f32; len];
    sum_in_rank_order(&mut sum, all.iter().map(Vec::as_slice));
    sum
}

#[expect(clippy::mut_from_ref, reason = "the memory is shared, and these tests take turns")]
fn floats(memory: &SharedMemory) -> &mut [f32] {
    // SAFETY: aligned to a line, that long, and used by this rank alone between calls.
    unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().cast(), memory.len() / 4) }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn sums_are_those_of_other_groups_bit_for_bit() {
    for world_size in [1, 2, 3, 5] {
        run(world_size, |group| {
            for len in [0, 1, 17, SLOT / 4, SLOT / 4 + 1, 300_001] {
                let (own, expected) = (values(group.rank(), len), sum_of_values(world_size, len));
                let mut anywhere = own.clone();
                group.all_reduce_sum((&mut anywhere).into()).unwrap();
                assert_eq!(bits(&anywhere), bits(&expected), "{len} elements on {world_size} ranks");
                let memory = group.memory(4 * (len + 40)).unwrap().unwrap();
                let place = &mut floats(&memory)[8..8 + len];
                place.copy_from_slice(&own);
                group.all_reduce_sum(place.into()).unwrap();
                assert_eq!(bits(&floats(&memory)[8..8 + len]), bits(&expected), "{len} elements in memory");
                assert!(
                    floats(&memory)[8 + len..].iter().all(|&x| x == 0.0),
                    "what lies behind is left alone"
                );
            }
        });
    }
}

#[test]
fn lanes_sum_memory_while_the_group_does_other_things() {
    run(3, |group| {
        let lane = group.lane("gradients").unwrap();
        let memory = group.memory(4 << 20).unwrap().unwrap();
        let other = group.memory(1 << 20).unwrap().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..20 {
                    let (len, memory) =
                        (60_000 * round.min(4), if round % 5 == 0 { &other } else { &memory });
                    let place = &mut floats(memory)[16 * round..16 * round + len];
                    place.copy_from_slice(&values(lane.rank(), len));
                    lane.all_reduce_sum(place.into()).unwrap();
                    let sum = &floats(memory)[16 * round..16 * round + len];
                    assert_eq!(bits(sum), bits(&sum_of_values(3, len)), "round {round}");
                }
            });
            for round in 0..500u64 {
                if round % 50 == u64::from(group.rank()) {
                    thread::sleep(Duration::from_micros(300)); // more than anybody spins
                }
                let mut count = [u64::from(group.rank()), round];
                group.all_reduce_sum(Buffer::U64(&mut count)).unwrap();
                assert_eq!(count, [3, 3 * round]);
                let all = group.all_gather(&vec![round as u8; group.rank() as usize]).unwrap();
                assert_eq!(all, [vec![], vec![round as u8], vec![round as u8; 2]]);
            }
        });
    });
}

#[test]
fn long_data_travels_by_the_group_beneath() {
    run(2, |group| {
        let own = vec![group.rank() as u8; SLOT + group.rank() as usize];
        assert_eq!(group.all_gather(&own).unwrap(), [vec![0u8; SLOT], vec![1u8; SLOT + 1]]);
        for len in [3, SLOT + 1] {
            let mut word = vec![group.rank() as u8 + 5; len];
            group.broadcast((&mut word).into(), 1).unwrap();
            assert!(word.iter().all(|&x| x == 6), "{len}");
        }
        group.barrier().unwrap();
    });
}

#[test]
fn memory_that_only_some_ranks_use_is_summed_all_the_same() {
    run(2, |group| {
        let len = SLOT;
        let memory = group.memory(4 * len).unwrap().unwrap();
        let mut heap = vec![1f32; len];
        floats(&memory).fill(1.0);
        let place = if group.rank() == 0 { &mut heap[..] } else { floats(&memory) };
        group.all_reduce_sum(place.into()).unwrap();
        let place = if group.rank() == 0 { &heap[..] } else { floats(&memory) };
        assert!(place.iter().all(|&x| x == 2.0));
        // Other parts of it on each rank, too.
        let rank = group.rank() as usize;
        floats(&memory).fill(1.0);
        let part = &mut floats(&memory)[16 * rank..][..len - 16];
        group.all_reduce_sum(part.into()).unwrap();
        assert!(floats(&memory)[16 * rank..][..len - 16].iter().all(|&x| x == 2.0));
        // And after it was given back.
        drop(memory);
        group.all_reduce_sum((&mut heap).into()).unwrap();
    });
}

#[test]
fn different_calls_are_an_error_that_names_both() {
    let results = run(3, |group| {
        group.barrier()?;
        if group.rank() == 2 { group.barrier() } else { group.all_reduce_sum((&mut vec![0f64; 4]).into()) }
    });
    for result in results {
        let text = result.unwrap_err().to_string();
        let expected = "rank 0 calls all-reduce of 4 f64 as its call 1, rank 2 calls barrier as its call 1";
        assert!(text.ends_with(expected), "{text}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let began = Instant::now();
    let results = threads::run(3, PATIENCE, |rank| {
        let group = Shm::over(Arc::new(rank), || Duration::from_millis(300)).unwrap().unwrap();
        let lane = group.lane("gradients").unwrap();
        let memory = group.memory(1 << 20).unwrap().unwrap();
        if group.rank() == 1 {
            thread::sleep(Duration::from_secs(1));
            return None;
        }
        Some(lane.all_reduce_sum(floats(&memory).into()).unwrap_err().to_string())
    });
    for (rank, text) in results.into_iter().enumerate().filter_map(|(rank, text)| Some((rank, text?))) {
        let begin = format!(
            "all-reduce (call 0 on lane gradients) failed on rank {rank} of 3: waited 0.3 s for rank 1;"
        );
        assert!(text.starts_with(&begin), "{text}");
    }
    assert!(began.elapsed() < PATIENCE / 2);
}

#[test]
fn the_end_is_the_end_of_all_lanes() {
    run(2, |group| {
        let lane = group.lane("gradients").unwrap();
        assert_eq!(lane.finish().unwrap_err().kind, ErrorKind::OnLane);
        group.barrier().unwrap();
        group.finish().unwrap();
        for error in [group.barrier().unwrap_err(), lane.barrier().unwrap_err()] {
            assert_eq!(error.kind, ErrorKind::Finished);
        }
        assert_eq!(group.memory(1).unwrap_err().kind, ErrorKind::Finished);
    });
}

#[test]
fn more_ranks_than_cores_do_not_starve_one_another() {
    let began = Instant::now();
    run(12, |group| {
        for _ in 0..200 {
            let mut x = [1f64; 64];
            group.all_reduce_sum((&mut x[..]).into()).unwrap();
            assert_eq!(x[63], 12.0);
        }
    });
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
}

/// A group whose first rank offers memory that is not there, or not its own.
struct Elsewhere(ThreadRank, u64);

impl Collectives for Elsewhere {
    fn rank(&self) -> u32 {
        self.0.rank()
    }
    fn world_size(&self) -> u32 {
        self.0.world_size()
    }
    fn all_reduce_sum(&self, buffer: Buffer<'_>) -> Result<(), CollectiveError> {
        self.0.all_reduce_sum(buffer)
    }
    fn broadcast(&self, buffer: Buffer<'_>, root: u32) -> Result<(), CollectiveError> {
        self.0.broadcast(buffer, root)
    }
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let mut all = self.0.all_gather(bytes)?;
        if all[0].len() == 24 {
            // The first byte of the process, of the descriptor, or of the proof.
            all[0][8 * self.1 as usize] ^= 0x55;
        }
        Ok(all)
    }
    fn barrier(&self) -> Result<(), CollectiveError> {
        self.0.barrier()
    }
    fn lane(&self, name: &str) -> Result<Arc<dyn Collectives>, CollectiveError> {
        self.0.lane(name)
    }
    fn finish(&self) -> Result<(), CollectiveError> {
        self.0.finish()
    }
    fn abort(&self, code: i32) -> ! {
        self.0.abort(code)
    }
}

#[test]
fn ranks_without_common_memory_all_learn_why() {
    for word in 0..3 {
        let results = threads::run(3, PATIENCE, |rank| {
            let group = Elsewhere(rank, word);
            Shm::over(Arc::new(group), || PATIENCE).unwrap().map(drop).unwrap_err().to_string()
        });
        assert!(results.iter().all(|text| text == &results[0]), "{results:?}");
        assert!(results[0].starts_with("the ranks share no memory: rank 1: /proc/"), "{results:?}");
    }
}
