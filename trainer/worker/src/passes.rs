//! The forward and backward pass of a step. On a device they are recorded once, as one graph, and launched at a stroke from
//! then on: what the host would spend on launching hundreds of kernels one by one, the device does not wait for.

use mentee_ssl::{SslError, StepLoss};
use mentee_torch_ext::TorchError;
use mentee_torch_ext::cuda::{self, NotRecorded};
use tch::{Device, Tensor};

/// Steps before the recording, in which libraries choose their algorithms and take their memory.
const WARM_UP: u32 = 3;

/// `0` has every kernel launched by itself.
const GRAPHS: &str = "MENTEE_GRAPHS";

/// What records a pass.
pub trait Recorder {
    /// What was recorded.
    type Graph;

    /// Records what `work` does on this thread's stream.
    fn record<T, E: From<TorchError>>(
        &mut self,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<(Self::Graph, T), NotRecorded<E>>;

    /// Does what was recorded, on this thread's stream.
    fn launch(&mut self, graph: &Self::Graph) -> Result<(), TorchError>;
}

/// CUDA graphs of one device.
pub struct Cuda {
    index: usize,
}

impl Recorder for Cuda {
    type Graph = cuda::Graph;

    fn record<T, E: From<TorchError>>(
        &mut self,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<(cuda::Graph, T), NotRecorded<E>> {
        cuda::Graph::record(self.index, work)
    }

    fn launch(&mut self, graph: &cuda::Graph) -> Result<(), TorchError> {
        graph.launch()
    }
}

/// See the module.
pub struct Passes<R: Recorder = Cuda> {
    recording: Option<Recording<R>>,
}

struct Recording<R: Recorder> {
    recorder: R,
    /// Steps so far.
    done: u32,
    recorded: Option<Recorded<R::Graph>>,
}

struct Recorded<G> {
    graph: G,
    /// What the graph reads.
    views: Tensor,
    /// What it makes.
    out: StepLoss,
}

impl Passes {
    /// With a graph where `device` is one and `may_record`: the same work in every step, of one part and without any other
    /// rank. Work goes to a stream of its own from then on.
    pub fn new(device: Device, may_record: bool) -> Result<Self, SslError> {
        let Device::Cuda(index) = device else { return Ok(Self { recording: None }) };
        let wanted = std::env::var(GRAPHS).map_or(true, |value| value != "0");
        if !may_record || !wanted || !cuda::Graph::is_supported() {
            return Ok(Self { recording: None });
        }
        cuda::synchronise(index)?;
        cuda::Stream::new(index)?.enter()?;
        Ok(Self::by(Cuda { index }))
    }
}

impl<R: Recorder> Passes<R> {
    fn by(recorder: R) -> Self {
        Self { recording: Some(Recording { recorder, done: 0, recorded: None }) }
    }

    /// Gives back the memory of what was recorded; the next run records it anew.
    pub fn forget(&mut self) {
        if let Some(recording) = &mut self.recording {
            recording.recorded = None;
        }
    }

    /// Runs `both`, forward and backward, on `views`, or what was recorded of it.
    pub fn run<E>(
        &mut self,
        views: &Tensor,
        mut both: impl FnMut(&Tensor) -> Result<StepLoss, E>,
    ) -> Result<StepLoss, E>
    where
        E: From<TorchError> + From<tch::TchError> + std::fmt::Display,
    {
        let Some(recording) = &mut self.recording else { return both(views) };
        recording.done += 1;
        if recording.done <= WARM_UP {
            return both(views);
        }
        let Recording { recorder, recorded, .. } = recording;
        let recorded = match recorded {
            Some(recorded) if recorded.views.size() == views.size() => {
                recorded.views.f_copy_(views)?;
                recorded
            }
            _ => {
                *recorded = None; // its memory first
                let mut own = views.f_empty_like()?;
                own.f_copy_(views)?;
                match recorder.record(|| both(&own)) {
                    Ok((graph, out)) => {
                        tracing::debug!("forward and backward are recorded");
                        recorded.insert(Recorded { graph, views: own, out: out.without_graph() })
                    }
                    Err(NotRecorded::Refused(error)) => {
                        tracing::warn!("kernels are launched one by one: recording a step failed: {error}");
                        self.recording = None;
                        return both(views);
                    }
                    Err(NotRecorded::Broken(error)) => {
                        let error = format!(
                            "recording a step as a graph failed in a way that libtorch's device memory does not survive: \
                             {error}; set {GRAPHS}=0 to launch kernels one by one"
                        );
                        return Err(TorchError::new(error).into());
                    }
                }
            }
        };
        recorder.launch(&recorded.graph)?;
        Ok(recorded.out.shallow_clone())
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    /// A graph of the fake is its number; work that is recorded is not done before it is launched, so the fake does nothing
    /// but count.
    #[derive(Default)]
    struct Fake {
        records: u32,
        launches: Vec<u32>,
        refuses: bool,
        breaks: bool,
    }

    impl Recorder for Fake {
        type Graph = u32;

        fn record<T, E: From<TorchError>>(
            &mut self,
            work: impl FnOnce() -> Result<T, E>,
        ) -> Result<(u32, T), NotRecorded<E>> {
            self.records += 1;
            let made = work().map_err(NotRecorded::Refused)?;
            let error = || TorchError::new("no".into());
            if self.refuses {
                return Err(NotRecorded::Refused(error().into()));
            }
            if self.breaks {
                return Err(NotRecorded::Broken(error()));
            }
            Ok((self.records, made))
        }

        fn launch(&mut self, graph: &u32) -> Result<(), TorchError> {
            self.launches.push(*graph);
            Ok(())
        }
    }

    fn views(rows: i64, value: f64) -> Tensor {
        Tensor::full([rows, 3, 2, 2], value, (Kind::Float, Device::Cpu))
    }

    /// The loss is the sum of what was read.
    fn both(views: &Tensor) -> Result<StepLoss, SslError> {
        Ok(StepLoss::new(views.f_sum(Kind::Double)?, &views.f_flatten(1, -1)?))
    }

    #[test]
    fn after_the_warm_up_a_step_is_recorded_once_and_launched_from_then_on() {
        let mut passes = Passes::by(Fake::default());
        let mut calls = 0;
        for step in 0..WARM_UP + 4 {
            let out = passes.run(&views(2, f64::from(step)), |views| {
                calls += 1;
                both(views)
            });
            assert_eq!(out.unwrap().projections.size(), [2, 12]);
        }
        assert_eq!(calls, WARM_UP + 1);
        let recording = passes.recording.as_ref().unwrap();
        assert_eq!((recording.recorder.records, recording.recorder.launches.len()), (1, 4));
        // What the graph reads is the last step's.
        let read = &recording.recorded.as_ref().unwrap().views;
        assert_eq!(read.double_value(&[1, 2, 1, 1]), f64::from(WARM_UP + 3));
    }

    #[test]
    fn a_recording_that_breaks_the_device_ends_the_run() {
        let mut passes = Passes::by(Fake { breaks: true, ..Fake::default() });
        for _ in 0..WARM_UP {
            passes.run(&views(2, 1.0), both).unwrap();
        }
        let error = passes.run(&views(2, 1.0), both).unwrap_err().to_string();
        assert!(error.ends_with("no; set MENTEE_GRAPHS=0 to launch kernels one by one"), "{error}");
    }

    #[test]
    fn what_was_forgotten_is_recorded_once_more() {
        let mut passes = Passes::by(Fake::default());
        for step in 0..WARM_UP + 4 {
            if step == WARM_UP + 2 {
                passes.forget();
            }
            passes.run(&views(2, 1.0), both).unwrap();
        }
        assert_eq!(passes.recording.unwrap().recorder.launches, [1, 1, 2, 2]);
    }

    #[test]
    fn another_shape_is_recorded_anew() {
        let mut passes = Passes::by(Fake::default());
        for rows in [2, 2, 2, 2, 4, 4] {
            passes.run(&views(rows, 1.0), both).unwrap();
        }
        assert_eq!(passes.recording.unwrap().recorder.launches, [1, 2, 2]);
    }

    #[test]
    fn a_pass_that_cannot_be_recorded_leaves_its_gradient_once() {
        let small = ["model.backbone=resnet20", "views.size=8", "schedule.global_batch=2"].map(str::to_owned);
        let recipe = mentee_config::Recipe::load("demo", &small).unwrap();
        let (method, mut state) = mentee_ssl::state::new(&recipe).unwrap();
        let layout = state.student.weights.layout.clone();
        let mut passes = Passes::by(Fake { refuses: true, ..Fake::default() });
        let views = Tensor::arange(4 * 3 * 64, (Kind::Float, Device::Cpu)).sin().reshape([4, 3, 8, 8]);
        let mut gradient = || {
            let out = passes.run(&views, |views| -> Result<_, SslError> {
                let statistics = recipe.parallel.norm_statistics;
                let out =
                    state.loss(&*method, views, 2, statistics, &mentee_ssl::layers::OverRanks::ALONE)?;
                state.backward(&out.loss, 0)?;
                Ok(out)
            });
            out.unwrap();
            state.gradients.complete(&layout).unwrap();
            state.gradients.flat.copy()
        };
        let usual = gradient();
        let after_failure = (1..=WARM_UP).map(|_| gradient()).last().unwrap();
        assert!(passes.recording.is_none());
        assert!(usual.norm().double_value(&[]) > 0.0);
        assert_eq!(usual, after_failure);
    }

    #[test]
    fn what_cannot_be_recorded_is_done_one_by_one() {
        let mut passes = Passes::by(Fake { refuses: true, ..Fake::default() });
        for step in 0..WARM_UP + 3 {
            let out = passes.run(&views(1, f64::from(step)), both).unwrap();
            assert_eq!(out.loss.double_value(&[]), 12.0 * f64::from(step));
        }
        assert!(passes.recording.is_none());
    }
}
