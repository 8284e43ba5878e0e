//! Which rank writes what.

/// The rank that writes each tensor, of which `sizes` are the bytes: the largest first, each to the rank that has the
/// least so far, of equals to the lower. So every rank comes to the same split by itself, and the longest share exceeds
/// the mean by less than one tensor.
pub fn split(sizes: &[usize], world_size: u32) -> Vec<u32> {
    let mut largest_first: Vec<usize> = (0..sizes.len()).collect();
    largest_first.sort_by_key(|&n| std::cmp::Reverse(sizes[n])); // stable: equals stay in order
    let mut load = vec![0; world_size.max(1) as usize];
    let mut ranks = vec![0; sizes.len()];
    for n in largest_first {
        let least = (0..load.len()).min_by_key(|&rank| load[rank]).unwrap_or(0);
        load[least] += sizes[n];
        ranks[n] = least as u32;
    }
    ranks
}

/// The name of a rank's file.
pub fn file_name(rank: u32, world_size: u32) -> String {
    if world_size == 1 {
        return "state.safetensors".into();
    }
    format!("state-{rank:05}-of-{world_size:05}.safetensors")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_even_to_a_tensor() {
        let sizes: Vec<usize> = (0..200).map(|n| 1 + n * 7919 % 1000).collect();
        let (total, largest) = (sizes.iter().sum::<usize>(), *sizes.iter().max().unwrap());
        for world_size in [1, 2, 3, 7, 64, 300] {
            let ranks = split(&sizes, world_size);
            let mut load = vec![0; world_size as usize];
            ranks.iter().zip(&sizes).for_each(|(rank, size)| load[*rank as usize] += size);
            assert_eq!(load.iter().sum::<usize>(), total);
            let longest = *load.iter().max().unwrap();
            assert!(longest < total / world_size as usize + largest + 1, "{world_size}: {load:?}");
        }
        assert_eq!(split(&[5, 9, 5, 5], 2), [1, 0, 1, 0]);
        assert_eq!(split(&[], 2), [0; 0]);
    }

    #[test]
    fn names_of_files_are_in_the_order_of_ranks() {
        assert_eq!(file_name(0, 1), "state.safetensors");
        assert_eq!(file_name(3, 64), "state-00003-of-00064.safetensors");
    }
}
