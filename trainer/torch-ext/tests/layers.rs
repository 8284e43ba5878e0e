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
