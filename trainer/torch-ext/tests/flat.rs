//! What moves into and within flat buffers.

use mentee_torch_ext::{gather, leaf, on_gradient};
use tch::{Device, Kind, Tensor};

fn counting(shape: &[i64]) -> Tensor {
    Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu)).reshape(shape)
}

#[test]
fn a_gradient_finds_its_place_however_it_lies_in_memory() {
    let shape = [3, 5, 2, 4];
    for kind in [Kind::Float, Kind::BFloat16] {
        let plain = counting(&shape).to_kind(kind);
        let channels_last = plain.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
        let with_gaps = counting(&[3, 5, 2, 8]).to_kind(kind).slice(3, 0, 8, 2);
        for gradient in [&plain, &channels_last, &with_gaps] {
            let flat = Tensor::full([200], 7, (Kind::Float, Device::Cpu));
            let mut to = leaf(&flat, 40, &shape, false).unwrap();
            let expected = gradient.to_kind(Kind::Float);
            assert!(gather(gradient, &mut to, false).unwrap());
            assert_eq!(to, expected, "{kind:?}");
            assert!(gather(gradient, &mut to, true).unwrap());
            assert_eq!(to, &expected * 2.0, "{kind:?}");
            let around = Tensor::cat(&[flat.narrow(0, 0, 40), flat.narrow(0, 160, 40)], 0);
            assert_eq!(around, Tensor::full([80], 7, (Kind::Float, Device::Cpu)), "{kind:?}: others' places");
        }
    }
    let mut to = Tensor::zeros([4], (Kind::Float, Device::Cpu));
    let error = gather(&counting(&[2, 2]), &mut to, false).unwrap_err().to_string();
    assert!(error.contains("a gradient of [2, 2] for [4]"), "{error}");
}

/// More values than one chunk has, so that any thread may find it.
#[test]
fn one_value_that_is_not_finite_is_found_anywhere() {
    const LEN: i64 = 100_000;
    for at in [0, 17, LEN / 2, LEN - 1] {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for kind in [Kind::Float, Kind::BFloat16] {
                let gradient = Tensor::ones([LEN], (kind, Device::Cpu));
                let mut to = Tensor::zeros([LEN], (Kind::Float, Device::Cpu));
                assert!(gather(&gradient, &mut to, true).unwrap());
                let _ = gradient.narrow(0, at, 1).fill_(value);
                assert!(!gather(&gradient, &mut to, false).unwrap(), "{value} at {at}");
            }
        }
    }
}

#[test]
fn a_hook_that_fails_ends_the_pass_and_the_next_one_works() {
    let flat = Tensor::ones([6], (Kind::Double, Device::Cpu));
    let mut parameter = leaf(&flat, 0, &[6], true).unwrap();
    on_gradient(&mut parameter, Box::new(|_| false)).unwrap();
    let error = (&parameter * 2.0).sum(Kind::Double).f_backward().unwrap_err().to_string();
    assert!(error.contains("what follows a gradient failed"), "{error}");
    on_gradient(&mut parameter, Box::new(|_| panic!("a bug"))).unwrap();
    assert!((&parameter * 2.0).sum(Kind::Double).f_backward().is_err());
    on_gradient(&mut parameter, Box::new(|gradient| gradient.double_value(&[5]) == 2.0)).unwrap();
    (&parameter * 2.0).sum(Kind::Double).f_backward().unwrap();
    assert!(!parameter.grad().defined());
}
