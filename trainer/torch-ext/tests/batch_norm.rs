//! The fused batch norm against plain tensor operations, on one rank and on ranks as threads.

use std::sync::{Arc, Barrier, Mutex};

use mentee_torch_ext::{Norm, StatReduce, batch_norm_apply, batch_norm_train};
use tch::{Device, Kind, Tensor};

/// norm → + residual → ReLU written with tensor operations, one group.
fn reference(x: &Tensor, w: &Tensor, b: &Tensor, residual: Option<&Tensor>, relu: bool) -> Tensor {
    let dims: Vec<i64> = if x.dim() == 4 { vec![0, 2, 3] } else { vec![0] };
    let shape: Vec<i64> = if x.dim() == 4 { vec![1, -1, 1, 1] } else { vec![1, -1] };
    let mean = x.mean_dim(dims.as_slice(), true, x.kind());
    let centred = x - &mean;
    let variance = centred.square().mean_dim(dims.as_slice(), true, x.kind());
    let mut y = centred * (variance + 1e-5).rsqrt() * w.view(shape.as_slice()) + b.view(shape.as_slice());
    if let Some(residual) = residual {
        y += residual;
    }
    if relu { y.relu() } else { y }
}

fn randn(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (kind, Device::Cpu)) * 1.5 + 0.3
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    (&a - &b).abs().max().double_value(&[]) / b.abs().max().double_value(&[]).max(1e-12)
}

fn leaf(t: &Tensor) -> Tensor {
    t.copy().set_requires_grad(true)
}

#[test]
fn agrees_with_plain_operations_per_view() {
    for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 2e-5)] {
        for shape in [vec![8, 6, 5, 5], vec![16, 33]] {
            for (relu, with_residual) in [(false, false), (true, false), (true, true)] {
                let x = randn(&shape, kind);
                let residual = randn(&shape, kind);
                let (w, b) = (randn(&[shape[1]], kind), randn(&[shape[1]], kind));
                let dy = randn(&shape, kind);

                let (xa, ra, wa, ba) = (leaf(&x), leaf(&residual), leaf(&w), leaf(&b));
                let norm = Norm { affine: Some((&wa, &ba)), eps: 1e-5, relu };
                let (y, _) = batch_norm_train(&xa, norm, with_residual.then_some(&ra), 2, None).unwrap();
                (&y * &dy).sum(kind).backward();

                let (xb, rb, wb, bb) = (leaf(&x), leaf(&residual), leaf(&w), leaf(&b));
                let (xs, rs) = (xb.chunk(2, 0), rb.chunk(2, 0));
                let views: Vec<Tensor> = (0..2)
                    .map(|i| reference(&xs[i], &wb, &bb, with_residual.then_some(&rs[i]), relu))
                    .collect();
                let expected = Tensor::cat(&views, 0);
                (&expected * &dy).sum(kind).backward();

                let mut pairs = vec![
                    ("y", relative(&y, &expected)),
                    ("dx", relative(&xa.grad(), &xb.grad())),
                    ("dw", relative(&wa.grad(), &wb.grad())),
                    ("db", relative(&ba.grad(), &bb.grad())),
                ];
                if with_residual {
                    pairs.push(("dresidual", relative(&ra.grad(), &rb.grad())));
                }
                for (name, difference) in pairs {
                    assert!(difference < tolerance, "{name} {kind:?} {shape:?} relu {relu}: {difference:e}");
                }
            }
        }
    }
}

#[test]
fn unequal_ranks_equal_one_rank() {
    let kind = Kind::Double;
    let x = randn(&[7, 5, 3, 3], kind);
    let dy = randn(&[7, 5, 3, 3], kind);
    let (w, b) = (randn(&[5], kind), randn(&[5], kind));

    let whole = leaf(&x);
    let (ww, wb) = (leaf(&w), leaf(&b));
    let norm = Norm { affine: Some((&ww, &wb)), eps: 1e-5, relu: true };
    let (y, statistics) = batch_norm_train(&whole, norm, None, 1, None).unwrap();
    (&y * &dy).sum(kind).backward();
    assert_eq!(statistics.count, [63.0]);

    // Three ranks as threads, holding 4, 2 and 1 of the 7 samples.
    let sum = Arc::new(Mutex::new(Vec::new()));
    let barrier = Arc::new(Barrier::new(3));
    let cuts = [(0, 4), (4, 2), (6, 1)];
    let parts: Vec<(Tensor, Tensor)> = std::thread::scope(|scope| {
        let handles: Vec<_> = cuts
            .iter()
            .map(|&(begin, len)| {
                let (x, dy, w, b) =
                    (x.narrow(0, begin, len).copy(), dy.narrow(0, begin, len).copy(), w.copy(), b.copy());
                let (sum, barrier) = (sum.clone(), barrier.clone());
                scope.spawn(move || {
                    let reduce: StatReduce = Arc::new(move |values: &mut [f64]| {
                        {
                            let mut sum: std::sync::MutexGuard<Vec<f64>> = sum.lock().unwrap();
                            sum.resize(values.len(), 0.0);
                            sum.iter_mut().zip(&*values).for_each(|(s, v)| *s += v);
                        }
                        barrier.wait();
                        values.copy_from_slice(&sum.lock().unwrap());
                        if barrier.wait().is_leader() {
                            sum.lock().unwrap().clear();
                        }
                        barrier.wait();
                        true
                    });
                    let (x, w, b) =
                        (x.set_requires_grad(true), w.set_requires_grad(true), b.set_requires_grad(true));
                    let norm = Norm { affine: Some((&w, &b)), eps: 1e-5, relu: true };
                    let (y, _) = batch_norm_train(&x, norm, None, 1, Some(&reduce)).unwrap();
                    (&y * &dy).sum(Kind::Double).backward();
                    (x.grad(), w.grad())
                })
            })
            .collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    });
    let dx = Tensor::cat(&parts.iter().map(|p| p.0.shallow_clone()).collect::<Vec<_>>(), 0);
    let dw = parts.iter().fold(Tensor::zeros([5], (kind, Device::Cpu)), |sum, p| sum + &p.1);
    assert!(relative(&dx, &whole.grad()) < 1e-12);
    assert!(relative(&dw, &ww.grad()) < 1e-12);
}

#[test]
fn a_failed_reduction_is_an_error_and_the_next_pass_works() {
    let x = leaf(&randn(&[4, 3], Kind::Float));
    let norm = Norm { affine: None, eps: 1e-5, relu: false };
    let failing: StatReduce = Arc::new(|_: &mut [f64]| false);
    let error = batch_norm_train(&x, norm, None, 1, Some(&failing)).unwrap_err();
    assert!(error.to_string().contains("all-reduce of batch-norm statistics failed"), "{error}");
    let panicking: StatReduce = Arc::new(|_: &mut [f64]| panic!("a rank is gone"));
    assert!(batch_norm_train(&x, norm, None, 1, Some(&panicking)).is_err());
    assert!(batch_norm_train(&x, norm, None, 1, None).is_ok());
}

#[test]
fn the_same_bits_for_any_number_of_threads() {
    let x = randn(&[16, 24, 20, 20], Kind::Float);
    let norm = Norm { affine: None, eps: 1e-5, relu: true };
    let run = |threads| {
        tch::set_num_threads(threads);
        let x = leaf(&x);
        let (y, _) = batch_norm_train(&x, norm, None, 2, None).unwrap();
        y.square().sum(Kind::Float).backward();
        x.grad()
    };
    let (one, two) = (run(1), run(2));
    assert!(one.equal(&two));
}

#[test]
fn bf16_rounds_only_its_output() {
    let x = randn(&[8, 6, 5, 5], Kind::Float).to_kind(Kind::BFloat16);
    let (w, b) = (randn(&[6], Kind::Float), randn(&[6], Kind::Float));
    let norm = Norm { affine: Some((&w, &b)), eps: 1e-5, relu: true };
    let (y, _) = batch_norm_train(&x, norm, None, 1, None).unwrap();
    assert_eq!(y.kind(), Kind::BFloat16);
    let expected = reference(&x.to_kind(Kind::Float), &w, &b, None, true);
    assert!(relative(&y, &expected) < 4e-3);
}

#[test]
fn applies_given_statistics() {
    let x = randn(&[4, 3, 2, 2], Kind::Double);
    let norm = Norm { affine: None, eps: 0.0, relu: false };
    let y = batch_norm_apply(&x, norm, None, &[1.0, 2.0, 3.0], &[4.0, 9.0, 16.0]).unwrap();
    let mean = Tensor::from_slice(&[1.0, 2.0, 3.0]).view([1, 3, 1, 1]);
    let std = Tensor::from_slice(&[2.0, 3.0, 4.0]).view([1, 3, 1, 1]);
    assert!(relative(&y, &((&x - mean) / std)) < 1e-14);
}
