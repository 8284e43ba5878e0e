//! Elementary functions from +, −, ×, ÷ only, which IEEE 754 fixes to the last bit: the same draws and the same
//! pixels on every machine, whatever its C library.

/// e^x for |x| < 700, relative error below 1e-15.
pub(crate) fn exp(x: f64) -> f64 {
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    if x < -700.0 {
        return 0.0;
    }
    let x = x.min(700.0);
    // x = k·ln 2 + r, |r| <= ln 2 / 2
    let scaled = x * std::f64::consts::LOG2_E;
    let k = (if scaled < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i64;
    let r = (x - k as f64 * LN2_HIGH) - k as f64 * LN2_LOW;
    // Taylor series by Horner: r^14/14! is below 5e-18 here.
    let mut sum = 1.0;
    for n in (1..=14).rev() {
        sum = 1.0 + r * sum / f64::from(n);
    }
    sum * f64::from_bits(((1023 + k) as u64) << 52)
}

/// Natural logarithm of a positive normal number, absolute error below 1e-14.
pub(crate) fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut k = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut m = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52)); // [1, 2)
    if m > std::f64::consts::SQRT_2 {
        m /= 2.0;
        k += 1;
    }
    // ln m = 2 atanh((m − 1)/(m + 1)), |t| < 0.172
    let t = (m - 1.0) / (m + 1.0);
    let t2 = t * t;
    let mut sum = 0.0;
    for n in (0..12).rev() {
        sum = 1.0 / f64::from(2 * n + 1) + t2 * sum;
    }
    k as f64 * std::f64::consts::LN_2 + 2.0 * t * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_ln_agree_with_the_c_library() {
        for i in -4000..4000 {
            let x = f64::from(i) * 0.0173;
            assert!((exp(x) / x.exp() - 1.0).abs() < 2e-15, "exp({x})");
            let y = (f64::from(i) + 4000.5) * 0.37;
            assert!((ln(y) - y.ln()).abs() < 1e-14, "ln({y})");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1000.0), 0.0);
    }
}
