//! Which instructions this processor has. Every choice made by them leaves the results alone: integers are integers, and
//! floats are added and multiplied one by one in the same order, never fused.

/// AVX2 and the bit instructions that every processor with it has.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx2() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx2") && has!("bmi1") && has!("bmi2") && has!("lzcnt")
}
