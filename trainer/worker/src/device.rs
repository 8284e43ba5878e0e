//! Where a rank computes: the processor, or one of NVIDIA's devices through libtorch, which is opened when it is needed.
//! Several ranks on devices form a [`DeviceGroup`] over NCCL beside the group in host memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mentee_cluster::{Identity, server};
use mentee_collectives::nccl::{Communicator, Library, Options};
use mentee_collectives::{
    Collectives, DeviceBuffer, DeviceCollectives, DeviceError, DeviceType, Event, EventError, Stream,
};
use mentee_config::Recipe;
use mentee_config::recipe::{self, Precision};
use mentee_torch_ext::cuda::{self, NoCuda};
use mentee_torch_ext::file_of_libtorch;
use tch::Device;

use crate::agree;
use crate::ahead::Ahead;
use crate::error::WorkerError;
use crate::waits::Waits;

/// The device of a recipe on this rank, ready to be used by this thread.
pub fn of_recipe(recipe: &Recipe, identity: &Identity) -> Result<Device, WorkerError> {
    choose(recipe.parallel.device, identity.local_rank, cuda::open).and_then(|device| {
        if let Device::Cuda(index) = device {
            enter(index, recipe)?;
            let (major, minor) = cuda::capability(index)?;
            if recipe.parallel.precision == Precision::Bf16 && major < 8 {
                return Err(WorkerError::Usage(format!(
                    "parallel.precision = \"bf16\": this device (compute capability {major}.{minor}) has no bf16, which begins \
                     with 8.0: set parallel.precision = \"f32\""
                )));
            }
        }
        Ok(device)
    })
}

/// Which device that is, over all machines; none on the processor, and where ranks are to share one: NCCL tells ranks of one
/// machine by `NCCL_HOSTID`.
pub fn slot(device: Device) -> Result<Option<String>, WorkerError> {
    let Device::Cuda(index) = device else { return Ok(None) };
    if std::env::var_os("NCCL_HOSTID").is_some() {
        return Ok(None);
    }
    let [domain, bus, slot] = cuda::slot(index)?;
    Ok(Some(format!("{domain:04x}:{bus:02x}:{slot:02x} of {}", server::hostname())))
}

/// Makes a device the one of this thread. Every thread that uses it does so.
pub fn enter(index: usize, recipe: &Recipe) -> Result<(), WorkerError> {
    // f32 means f32, and then the algorithms of a run should not depend on what was fastest at its start.
    let autotune = recipe.parallel.precision == Precision::Bf16;
    Ok(cuda::use_device(index, cuda::Settings { autotune, tf32: false })?)
}

/// What a count of no device means, where there is a driver.
const NO_DEVICE: &str = "there is an NVIDIA driver, and no device that libtorch can use: see nvidia-smi, CUDA_VISIBLE_DEVICES, and \
                         whether the driver is new enough for CUDA 13 (580 and later)";

fn choose(
    wanted: recipe::Device,
    local_rank: u32,
    open: impl FnOnce() -> Result<u32, NoCuda>,
) -> Result<Device, WorkerError> {
    if wanted == recipe::Device::Cpu {
        return Ok(Device::Cpu);
    }
    match (open(), wanted) {
        // As many ranks as devices is usual; `agree::on_device` refuses more.
        (Ok(count), _) if count > 0 => Ok(Device::Cuda((local_rank % count) as usize)),
        (Ok(_), recipe::Device::Cuda) => {
            Err(WorkerError::Usage(format!("parallel.device = \"cuda\": {NO_DEVICE}")))
        }
        (Ok(_), _) => {
            tracing::warn!("computing on the processor: {NO_DEVICE}");
            Ok(Device::Cpu)
        }
        (Err(reason), recipe::Device::Cuda) => {
            let remedy = r#"run it where there is one, or set parallel.device = "auto" or "cpu""#;
            Err(WorkerError::Usage(format!("parallel.device = \"cuda\": {reason}: {remedy}")))
        }
        (Err(reason @ NoCuda::NoLibrary { .. }), _) => {
            tracing::warn!("computing on the processor, though there is an NVIDIA driver: {reason}");
            Ok(Device::Cpu)
        }
        (Err(NoCuda::NoDriver), _) => Ok(Device::Cpu),
    }
}

/// An event of libtorch's as a group watches it.
pub struct CudaMark(pub cuda::Event);

impl Event for CudaMark {
    fn is_complete(&self) -> Result<bool, EventError> {
        self.0.is_complete().map_err(|error| EventError(error.to_string()))
    }
}

/// The ranks of a run, each on a device of its own.
pub struct DeviceGroup {
    /// Batch-norm statistics, in the order of the stream that computes.
    statistics: Arc<Communicator>,
    /// Gradient buckets, on a stream of their own.
    pub gradients: Arc<dyn DeviceCollectives>,
    /// How long a rank waits for the others.
    pub patience: Duration,
    ahead: Arc<Ahead>,
}

impl DeviceGroup {
    /// Every rank calls it at the same point; none in a world of one, and on the processor.
    pub fn start(
        host: &Arc<dyn Collectives>,
        recipe: &Recipe,
        device: Device,
        waits: &Arc<Waits>,
    ) -> Result<Option<Self>, WorkerError> {
        let Device::Cuda(index) = device else { return Ok(None) };
        if host.world_size() == 1 {
            return Ok(None);
        }
        let failed = |error: DeviceError| WorkerError::Failed(error.to_string());
        let patience = Duration::from_secs_f64(recipe.parallel.timeout_s);
        let library = Library::open(&beside_libtorch(file_of_libtorch().as_deref())).map(Arc::new);
        let options = Options { start_patience: patience, call_patience: patience, ..Options::default() };
        // Each step together: a rank that fails alone would meet the others at another exchange.
        let statistics = Communicator::start(library, host.clone(), options).map_err(failed);
        let statistics = Arc::new(agree::together(&**host, statistics)?);
        // Both are given work in one order on all ranks, forward's and then backward's, and a kernel of one fits beside
        // one of the other: NCCL takes 32 blocks at most. (For devices too small for that, NCCL has NCCL_LAUNCH_ORDER_IMPLICIT=1.)
        let gradients = agree::together(&**host, statistics.lane("gradients").map_err(failed))?;
        let mark = Box::new(move || -> Result<Arc<dyn Event>, _> {
            let (stream, _) = cuda::Stream::current(index)?;
            Ok(Arc::new(CudaMark(cuda::Event::record(stream)?)))
        });
        let ahead = Ahead::new(statistics.clone(), mark, patience, waits.clone());
        tracing::info!(
            nccl = %statistics.library().version(),
            file = %statistics.library().path().display(),
            "ranks are connected over NCCL"
        );
        Ok(Some(Self { statistics, gradients, patience, ahead }))
    }

    /// Batch-norm statistics of this rank.
    pub fn ahead(&self) -> &Arc<Ahead> {
        &self.ahead
    }

    /// Sums a contiguous tensor of f32 in place, and waits for it.
    pub fn sum(&self, values: &mut tch::Tensor) -> Result<(), WorkerError> {
        let Device::Cuda(index) = values.device() else {
            return Err(WorkerError::Failed("a tensor on no device".into()));
        };
        let failed = |source| WorkerError::DeviceCollective { step: 0, source: Box::new(source) };
        let (stream, handle) = cuda::Stream::current(index)?;
        // SAFETY: the tensor and libtorch's stream live until the wait below is over, or the group is aborted.
        let (buffer, handle) = unsafe {
            (DeviceBuffer::new(values.data_ptr(), values.numel(), DeviceType::F32), Stream::from_raw(handle))
        };
        let ticket = self.gradients.all_reduce_sum(buffer, handle).map_err(failed)?;
        let done = CudaMark(cuda::Event::record(stream)?);
        self.gradients.wait(ticket, &done, self.patience).map_err(failed)
    }

    /// After a failure: ends what is on its way, so that nothing waits for it.
    pub fn abort(&self, exit_code: i32) {
        // The failure that led here is what is reported.
        let _ = self.statistics.abort(exit_code);
    }

    /// The orderly end, on every rank.
    pub fn finish(&self) -> Result<(), WorkerError> {
        self.statistics.finish().map_err(|error| WorkerError::Failed(error.to_string()))
    }
}

/// Where libtorch's own NCCL lies when torch came as a wheel.
pub fn beside_libtorch(libtorch: Option<&Path>) -> Vec<PathBuf> {
    let Some(lib) = libtorch.and_then(Path::parent) else { return Vec::new() };
    let wheel = lib.ancestors().nth(2).map(|packages| packages.join("nvidia/nccl/lib"));
    wheel.into_iter().chain([lib.to_owned()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_take_the_devices_in_turn_and_say_why_there_is_none() {
        let four = || Ok(4);
        let no_driver = || Err(NoCuda::NoDriver);
        let broken =
            || Err(NoCuda::NoLibrary { file: PathBuf::from("libtorch_cuda.so"), reason: "broken".into() });
        use recipe::Device::{Auto, Cpu, Cuda};
        assert_eq!(choose(Auto, 1, four).unwrap(), Device::Cuda(1));
        assert_eq!(choose(Cuda, 6, four).unwrap(), Device::Cuda(2));
        assert_eq!(choose(Cpu, 1, || panic!("not asked for")).unwrap(), Device::Cpu);
        assert_eq!(choose(Auto, 0, no_driver).unwrap(), Device::Cpu);
        assert_eq!(choose(Auto, 0, broken).unwrap(), Device::Cpu);
        assert_eq!(choose(Auto, 0, || Ok(0)).unwrap(), Device::Cpu);
        for (error, part) in [
            (choose(Cuda, 0, no_driver), "no NVIDIA driver"),
            (choose(Cuda, 0, broken), "libtorch_cuda.so: broken"),
            (choose(Cuda, 0, || Ok(0)), "no device that libtorch can use"),
        ] {
            let text = error.unwrap_err().to_string();
            assert!(text.starts_with("parallel.device = \"cuda\": ") && text.contains(part), "{text}");
        }
    }

    #[test]
    fn nccl_is_looked_for_where_libtorch_does() {
        let libtorch = Path::new("/v/lib/python3.11/site-packages/torch/lib/libtorch_cpu.so");
        let expected =
            ["/v/lib/python3.11/site-packages/nvidia/nccl/lib", "/v/lib/python3.11/site-packages/torch/lib"];
        assert_eq!(beside_libtorch(Some(libtorch)), expected.map(PathBuf::from));
        assert!(beside_libtorch(None).is_empty());
    }
}
