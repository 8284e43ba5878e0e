//! Layers in bf16 against the same sums in f64: whichever kernel the processor gets, only the rounding of operands and
//! results may show.

use mentee_torch_ext::{conv2d, conv2d_padded, linear};
use tch::{Kind, Tensor};

/// bf16 keeps 8 bits: half a unit in the last place of the largest value, and some for sums of rounded gradients.
const TOLERANCE: f64 = 1.0 / 256.0;

fn leaf(shape: &[i64], seed: i64) -> Tensor {
    let count = shape.iter().product::<i64>();
    let values = Tensor::arange(count, (Kind::Double, tch::Device::Cpu));
    let values: Tensor = (values * 12.9898 + seed as f64).sin();
    values.to_kind(Kind::BFloat16).reshape(shape).set_requires_grad(true)
}

fn double(t: &Tensor) -> Tensor {
    t.detach().to_kind(Kind::Double).set_requires_grad(true)
}

fn assert_close(what: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.kind(), Kind::BFloat16, "{what}");
    let difference = (found.to_kind(Kind::Double) - expected).abs().max().double_value(&[]);
    let scale = expected.abs().max().double_value(&[]);
    assert!(difference <= TOLERANCE * scale, "{what}: {difference:e} of {scale:e}");
}

#[test]
fn a_bf16_convolution_rounds_operands_and_results_only() {
    for (kernel, stride) in [(3, 1), (3, 2), (1, 1), (1, 2)] {
        let x = leaf(&[4, 6, 9, 9], 1);
        let weight = leaf(&[5, 6, kernel, kernel], 2);
        let (x64, weight64) = (double(&x), double(&weight));
        let y = conv2d(&x, &weight, stride, kernel / 2).expect("a convolution");
        let y64 = x64.conv2d(&weight64, None::<&Tensor>, [stride; 2], [kernel / 2; 2], [1, 1], 1);
        assert_close("y", &y, &y64);
        let weights = leaf(&y64.size(), 3).detach();
        (&y * &weights).sum(Kind::BFloat16).backward();
        (&y64 * weights.to_kind(Kind::Double)).sum(Kind::Double).backward();
        assert_close("gradient of x", &x.grad(), &x64.grad());
        assert_close("gradient of the weight", &weight.grad(), &weight64.grad());
    }
}

/// An f32 tensor [n, c, h, w], channels-last in memory, of values of about one.
fn image(shape: [i64; 4], seed: i64) -> Tensor {
    let [n, c, h, w] = shape;
    let count = n * c * h * w;
    let values: Tensor =
        (Tensor::arange(count, (Kind::Double, tch::Device::Cpu)) * 12.9898 + seed as f64).sin();
    let values = (values * 43_758.545_3).frac() * 2.0;
    values.to_kind(Kind::Float).reshape([n, h, w, c]).permute([0, 3, 1, 2]).set_requires_grad(true)
}

/// The convolution's result and both gradients.
fn both_ways(conv: impl Fn(&Tensor, &Tensor) -> Tensor, x: &Tensor, weight: &Tensor) -> [Tensor; 3] {
    let y = conv(x, weight);
    // Of values that every type has.
    let weights = image(y.size().try_into().unwrap(), 3).detach().to_kind(Kind::BFloat16).to_kind(y.kind());
    (&y * weights).sum(y.kind()).backward();
    [y.detach(), x.grad(), weight.grad()]
}

fn by_tiles(x: &Tensor, weight: &Tensor) -> [Tensor; 3] {
    both_ways(|x, weight| conv2d(x, weight, 1, 1).expect("a convolution"), x, weight)
}

/// Batch, channels from and to, height, width. Tiles want multiples of 32 channels; the last has fewer, and goes the direct way. The
/// last but one has more tiles than weights' gradients are summed over at once.
const SHAPES: [[i64; 5]; 9] = [
    [3, 64, 64, 8, 8],
    [2, 64, 128, 7, 5],
    [1, 192, 64, 1, 2],
    [40, 128, 64, 9, 9],
    [5, 32, 32, 16, 16],
    [2, 32, 64, 4, 7],
    [2, 128, 96, 5, 3],
    [24, 64, 32, 31, 31],
    [2, 48, 64, 6, 6],
];

fn operands([n, from, to, height, width]: [i64; 5], kind: Kind) -> (Tensor, Tensor) {
    let of = |t: Tensor| t.detach().to_kind(kind).set_requires_grad(true);
    (of(image([n, from, height, width], 1)), of(image([to, from, 3, 3], 2)))
}

fn direct(x: &Tensor, weight: &Tensor) -> [Tensor; 3] {
    both_ways(|x, weight| x.conv2d(weight, None::<&Tensor>, [1, 1], [1, 1], [1, 1], 1), x, weight)
}

const NAMES: [&str; 3] = ["y", "gradient of x", "gradient of the weight"];

/// How far `found` is from `exact`, of exact's length.
fn off(found: &Tensor, exact: &Tensor) -> f64 {
    ((found.to_kind(Kind::Double) - exact).norm() / exact.norm()).double_value(&[])
}

#[test]
fn an_f32_convolution_by_tiles_rounds_little_more_than_the_direct_sum() {
    for shape in SHAPES {
        let (x, weight) = operands(shape, Kind::Float);
        let (x2, weight2) = operands(shape, Kind::Float);
        let found = by_tiles(&x, &weight);
        let plain = direct(&x2, &weight2);
        let exact = direct(&double(&x), &double(&weight));
        for (n, name) in NAMES.iter().enumerate() {
            assert_eq!(found[n].size(), exact[n].size(), "{name}");
            let (tiles, direct) = (off(&found[n], &exact[n]), off(&plain[n], &exact[n]));
            assert!(
                tiles <= 4.0 * direct + 2e-7,
                "{name} of {shape:?}: {tiles:e}, the direct sum's {direct:e}"
            );
        }
    }
}

/// Beside the result, the operands of its products are rounded, where the processor multiplies in bf16.
#[test]
fn a_bf16_convolution_by_tiles_rounds_twice_at_most() {
    for shape in SHAPES {
        let (x, weight) = operands(shape, Kind::BFloat16);
        let found = by_tiles(&x, &weight);
        let exact = direct(&double(&x), &double(&weight));
        for (n, name) in NAMES.iter().enumerate() {
            assert_eq!((found[n].size(), found[n].kind()), (exact[n].size(), Kind::BFloat16), "{name}");
            let rounding = off(&exact[n].to_kind(Kind::BFloat16), &exact[n]);
            let tiles = off(&found[n], &exact[n]);
            assert!(tiles <= 5.0 * rounding, "{name} of {shape:?}: {tiles:e}, one rounding {rounding:e}");
        }
    }
}

#[test]
fn a_convolution_by_tiles_is_the_same_on_any_number_of_threads_and_for_any_part_of_a_batch() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for shape in [[24, 64, 128, 10, 10], [24, 64, 32, 31, 31]] {
            let operands = || operands(shape, kind);
            let before = tch::get_num_threads();
            let on = |threads: i32| {
                tch::set_num_threads(threads);
                let (x, weight) = operands();
                by_tiles(&x, &weight)
            };
            let (one, three) = (on(1), on(3));
            tch::set_num_threads(before);
            for (a, b) in one.iter().zip(&three) {
                assert!(a.equal(b), "{kind:?}");
            }
            let (x, weight) = operands();
            let part = conv2d(&x.detach().narrow(0, 5, 7), &weight.detach(), 1, 1).expect("a convolution");
            assert!(part.equal(&one[0].narrow(0, 5, 7)), "{kind:?}");
        }
    }
}

#[test]
fn channels_of_zeros_change_nothing() {
    let channels_last = |shape: [i64; 4], seed| {
        let [n, c, h, w] = shape;
        let values = leaf(&[n, h, w, c], seed).detach().to_kind(Kind::Double);
        values.permute([0, 3, 1, 2]).set_requires_grad(true)
    };
    let images = || channels_last([4, 3, 9, 9], 1);
    let weights = || channels_last([5, 3, 3, 3], 2);
    let (x, weight, x2, weight2) = (images(), weights(), images(), weights());
    let y = conv2d_padded(&x, &weight, 2, 1).expect("a convolution");
    let y2 = conv2d(&x2, &weight2, 2, 1).expect("a convolution");
    (&y * &y).sum(Kind::Double).backward();
    (&y2 * &y2).sum(Kind::Double).backward();
    let pairs = [(&y, &y2), (&x.grad(), &x2.grad()), (&weight.grad(), &weight2.grad())];
    for (found, expected) in pairs {
        assert_eq!(found.size(), expected.size());
        let difference = (found - expected).abs().max().double_value(&[]);
        assert!(difference <= 1e-13 * expected.abs().max().double_value(&[]), "{difference:e}");
    }
}

#[test]
fn a_stem_over_blocks_is_the_convolution_it_stands_for() {
    for (height, width) in [(16, 12), (2, 2)] {
        let x = double(&leaf(&[2, 3, height, width], 1)).detach();
        let weight = || {
            let weight = double(&leaf(&[5, 3, 7, 7], 2)).detach().permute([0, 2, 3, 1]).contiguous();
            weight.permute([0, 3, 1, 2]).set_requires_grad(true)
        };
        let (weight, weight2) = (weight(), weight());
        let y = conv2d_padded(&x, &weight, 2, 3).expect("a convolution");
        let y2 = conv2d(&x, &weight2, 2, 3).expect("a convolution");
        (&y * &y).sum(Kind::Double).backward();
        (&y2 * &y2).sum(Kind::Double).backward();
        for (found, expected) in [(&y, &y2), (&weight.grad(), &weight2.grad())] {
            assert_eq!(found.size(), expected.size());
            let difference = (found - expected).abs().max().double_value(&[]);
            assert!(difference <= 1e-13 * expected.abs().max().double_value(&[]), "{difference:e}");
        }
    }
}

#[test]
fn a_bf16_linear_layer_rounds_operands_and_results_only() {
    for has_bias in [false, true] {
        let (x, weight, bias) = (leaf(&[7, 12], 1), leaf(&[5, 12], 2), leaf(&[5], 3));
        let (x64, weight64, bias64) = (double(&x), double(&weight), double(&bias));
        let y = linear(&x, &weight, has_bias.then_some(&bias)).expect("a linear layer");
        let y64 = x64.linear(&weight64, has_bias.then_some(&bias64));
        assert_close("y", &y, &y64);
        let weights = leaf(&y64.size(), 4).detach();
        (&y * &weights).sum(Kind::BFloat16).backward();
        (&y64 * weights.to_kind(Kind::Double)).sum(Kind::Double).backward();
        assert_close("gradient of x", &x.grad(), &x64.grad());
        assert_close("gradient of the weight", &weight.grad(), &weight64.grad());
        if has_bias {
            assert_close("gradient of the bias", &bias.grad(), &bias64.grad());
        }
    }
}

#[test]
fn other_types_are_libtorchs_own() {
    let (x, weight) = (double(&leaf(&[2, 3, 5, 5], 1)), double(&leaf(&[4, 3, 3, 3], 2)));
    let y = conv2d(&x, &weight, 1, 1).expect("a convolution");
    assert_eq!(y, x.conv2d(&weight, None::<&Tensor>, [1; 2], [1; 2], [1, 1], 1));
    assert!(conv2d(&x, &double(&leaf(&[4, 2, 3, 3], 2)), 1, 1).is_err(), "channels do not fit");
}
