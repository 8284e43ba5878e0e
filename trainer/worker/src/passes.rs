//! The forward and backward pass of a step. On a device they are recorded once, as one graph, and launched at a stroke from
//! then on: what the host would spend on launching hundreds of kernels one by one, the device does not wait for.

use mentee_ssl::{SslError, StepLoss};
use mentee_torch_ext::cuda;
use tch::{Device, Tensor};

/// Steps before the recording, in which libraries choose their algorithms and take their memory.
const WARM_UP: u32 = 3;

/// See the module.
#[derive(Default)]
pub struct Passes {
    recording: Option<Recording>,
}

struct Recording {
    device: usize,
    /// Steps so far.
    done: u32,
    recorded: Option<Recorded>,
}

struct Recorded {
    graph: cuda::Graph,
    /// What the graph reads.
    views: Tensor,
    /// What it makes.
    out: StepLoss,
}

impl Passes {
    /// With a graph where `device` is one and `may_record`: the same work in every step, of one part and without any other
    /// rank. Work goes to a stream of its own from then on.
    pub fn new(device: Device, may_record: bool) -> Result<Self, SslError> {
        let Device::Cuda(index) = device else { return Ok(Self::default()) };
        if !may_record || !cuda::Graph::is_supported() {
            return Ok(Self::default());
        }
        cuda::synchronise(index)?;
        cuda::Stream::new(index)?.enter()?;
        Ok(Self { recording: Some(Recording { device: index, done: 0, recorded: None }) })
    }

    /// Runs `both`, forward and backward, on `views`, or what was recorded of it.
    pub fn run<E>(
        &mut self,
        views: &Tensor,
        mut both: impl FnMut(&Tensor) -> Result<StepLoss, E>,
    ) -> Result<StepLoss, E>
    where
        E: From<mentee_torch_ext::TorchError> + From<tch::TchError> + std::fmt::Display,
    {
        let Some(recording) = &mut self.recording else { return both(views) };
        recording.done += 1;
        if recording.done <= WARM_UP {
            return both(views);
        }
        let recorded = match &mut recording.recorded {
            Some(recorded) if recorded.views.size() == views.size() => {
                recorded.views.f_copy_(views)?;
                recorded
            }
            _ => {
                recording.recorded = None; // its memory first
                let views = views.f_empty_like().and_then(|mut own| own.f_copy_(views).map(|()| own))?;
                let (graph, out) = match cuda::Graph::record(recording.device, || both(&views)) {
                    Ok(recorded) => recorded,
                    Err(error) => {
                        tracing::warn!("kernels are launched one by one: recording a step failed: {error}");
                        self.recording = None;
                        return both(&views);
                    }
                };
                tracing::debug!("forward and backward are recorded");
                recording.recorded.insert(Recorded { graph, views, out: out.without_graph() })
            }
        };
        recorded.graph.launch()?;
        Ok(recorded.out.share())
    }
}
