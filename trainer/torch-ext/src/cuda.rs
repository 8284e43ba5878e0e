//! The CUDA part of libtorch, opened at run time: the program itself links only the CPU part, and so starts on machines
//! without any of NVIDIA's libraries.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Device, Kind, Tensor};

use crate::{TorchError, check, file_of_libtorch, sys};

/// What NVIDIA's driver installs; there is no device without it.
const DRIVER: &str = "libcuda.so.1";
/// Registers CUDA's kernels with libtorch when it is loaded.
const CUDA_PART: &str = "libtorch_cuda.so";

/// Compiles the kernels.
const NVRTC: &str = "libnvrtc.so.13";
/// What NVRTC opens by itself, from wherever the loader looks.
const NVRTC_PART: &str = "libnvrtc-builtins.so.";
/// The kernels, compiled on the machine they run on.
const KERNELS: &str = concat!(
    include_str!("../cpp/kernels.cu"),
    include_str!("../cpp/views_layout.h"),
    include_str!("../cpp/views.cu")
);

/// Why there is no device to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoCuda {
    /// This machine has no driver.
    #[error("no NVIDIA driver ({DRIVER} cannot be loaded)")]
    NoDriver,
    /// There is a driver, and libtorch's CUDA part is missing or broken.
    #[error(
        "{}: {reason}; install torch with its CUDA libraries (ci/setup does where there is a driver)",
        file.display()
    )]
    NoLibrary {
        /// The file that was tried.
        file: PathBuf,
        /// The loader's account.
        reason: String,
    },
}

/// Opens libtorch's CUDA part, the one beside the CPU part that is loaded, and says how many devices it can use. Nothing
/// is opened where there is no driver. May be called again; then it only counts.
///
/// # Errors
/// See [`NoCuda`].
pub fn open() -> Result<u32, NoCuda> {
    // SAFETY: loads the driver, whose initialisers are NVIDIA's.
    let driver = unsafe { Library::open(Some(DRIVER), RTLD_NOW) }.map_err(|_| NoCuda::NoDriver)?;
    // It has threads and state of its own: never unloaded.
    std::mem::forget(driver);
    let libtorch = file_of_libtorch();
    open_part(&part_beside(libtorch.as_deref()))?;
    start_kernels(libtorch.as_deref());
    Ok(u32::try_from(tch::Cuda::device_count()).unwrap_or(0))
}

/// Tells the shim where its kernels and their compiler are. Nothing is compiled yet.
fn start_kernels(libtorch: Option<&Path>) {
    static SOURCE: OnceLock<CString> = OnceLock::new();
    let source = SOURCE.get_or_init(|| CString::new(KERNELS).unwrap_or_default());
    let nvrtc = nvrtc_beside(libtorch);
    if let Some(part) = nvrtc.parent().and_then(nvrtc_part) {
        // SAFETY: a library without initialisers of its own.
        if let Ok(part) = unsafe { Library::open(Some(part), RTLD_NOW | RTLD_GLOBAL) } {
            std::mem::forget(part);
        }
    }
    let file = CString::new(nvrtc.to_string_lossy().into_owned()).unwrap_or_default();
    // SAFETY: both strings end with NUL; the source lives as long as the process, the shim copies the file's name.
    unsafe { sys::mentee_device_start(source.as_ptr(), file.as_ptr()) };
}

/// NVRTC among the wheels beside torch's; else whatever the loader finds.
fn nvrtc_beside(libtorch: Option<&Path>) -> PathBuf {
    let packages = libtorch.and_then(|file| file.ancestors().nth(3));
    let folders = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"].iter();
    let mut files = folders.filter_map(|folder| packages.map(|packages| packages.join(folder).join(NVRTC)));
    files.find(|file| file.exists()).unwrap_or_else(|| PathBuf::from(NVRTC))
}

fn nvrtc_part(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?;
    let mut names: Vec<PathBuf> = files
        .filter_map(|file| Some(file.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NVRTC_PART)))
        .collect();
    names.sort();
    names.pop()
}

/// Compiles one part of the kernels (`flat`, `bf16`, `f32`, `f64`, `views`) for an architecture such as `sm_90`, as a run on such a
/// device does; returns the code's size in bytes. Needs NVRTC, and no device.
///
/// # Errors
/// When NVRTC is missing or refuses the source.
pub fn compile(part: &str, architecture: &str) -> Result<i64, TorchError> {
    start_kernels(file_of_libtorch().as_deref());
    let (part, architecture) =
        (CString::new(part).unwrap_or_default(), CString::new(architecture).unwrap_or_default());
    let mut bytes = 0;
    // SAFETY: both strings end with NUL and outlive the call.
    unsafe { check(sys::mentee_device_compile(part.as_ptr(), architecture.as_ptr(), &mut bytes)) }?;
    Ok(bytes)
}

/// Host memory that devices copy from directly, as long as this lives.
#[derive(Debug)]
pub struct Pinned {
    memory: *mut std::ffi::c_void,
    context: *mut std::ffi::c_void,
}

// SAFETY: both are names to the driver, which may be called from any thread.
unsafe impl Send for Pinned {}
// SAFETY: as above; nothing can be done with a reference.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Pins `bytes` at `memory`. This thread uses a device ([`use_device`]).
    ///
    /// # Errors
    /// When the system or the driver allows no (more) pinned memory.
    ///
    /// # Safety
    /// The memory stays where it is until this is dropped.
    pub unsafe fn new(memory: *mut u8, bytes: usize) -> Result<Self, TorchError> {
        let (memory, bytes) = (memory.cast(), i64::try_from(bytes).unwrap_or(i64::MAX));
        let mut context = std::ptr::null_mut();
        // SAFETY: the result outlives the call; the memory by this function's contract.
        unsafe { check(sys::mentee_pin(memory, bytes, &mut context)) }?;
        Ok(Self { memory, context })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it was pinned in this context.
        unsafe { sys::mentee_unpin(self.memory, self.context) };
    }
}

/// Images that a device holds, from which it makes views.
#[derive(Debug)]
pub struct Images {
    /// 8-bit RGB, `[H, W, 3]` each.
    pixels: Tensor,
    /// The most columns that one of them has.
    widest: i64,
    /// Of the views that are being made.
    scratch: Tensor,
    views: i64,
    side: i64,
}

impl Images {
    /// Brings images to a device, one behind the other, 8-bit RGB, `[H, W, 3]` each, of `widest` columns at most; `views` of
    /// `side` x `side` pixels are to be made of them at a time. A tenth of the device's memory stays free.
    ///
    /// # Errors
    /// When there is no room for that, or images or views are too large for the kernel.
    pub fn hold(
        pixels: &[u8],
        widest: u32,
        (views, side): (i64, u32),
        device: usize,
    ) -> Result<Self, TorchError> {
        let (widest, side, len) = (i64::from(widest), i64::from(side), pixels.len() as i64);
        let mut scratch = 0;
        // SAFETY: the result outlives the call.
        unsafe {
            check(sys::mentee_device_views_room(number(device), len, views, side, widest, &mut scratch))
        }?;
        let to = Device::Cuda(device);
        // SAFETY: the pixels outlive the tensor over them, of which the device gets a copy before this returns.
        let own = unsafe { Tensor::f_from_blob(pixels.as_ptr(), &[len], &[1], Kind::Uint8, Device::Cpu) };
        let pixels = own.and_then(|own| own.f_to_device(to)).map_err(TorchError::of)?;
        let scratch = Tensor::f_empty([scratch], (Kind::Uint8, to)).map_err(TorchError::of)?;
        Ok(Self { pixels, widest, scratch, views, side })
    }

    /// Makes the views, `[views, 3, side, side]` of `kind` (f32, f64 or bf16), channels-last in memory, as `words` direct: the format is
    /// told in `cpp/views.cu`. `normalise`: mean and 1/std of the channels. The work is put on this thread's stream, which is
    /// always the same.
    ///
    /// # Errors
    /// When sizes do not fit, when there is no memory, and when the kernel cannot be compiled or launched.
    ///
    /// # Safety
    /// All places that `words` name lie within them and within the images.
    pub unsafe fn views(
        &mut self,
        words: &[i32],
        normalise: [[f32; 3]; 2],
        kind: Kind,
    ) -> Result<Tensor, TorchError> {
        let Self { pixels, widest, scratch, views, side } = self;
        let words = Tensor::f_from_slice(words).and_then(|words| words.f_to_device(pixels.device()));
        let words = words.map_err(TorchError::of)?;
        let out = Tensor::f_empty([*views, *side, *side, 3], (kind, pixels.device()));
        let mut out = out.map_err(TorchError::of)?;
        // SAFETY: the tensors and the constants outlive the call; the places by this function's contract.
        unsafe {
            check(sys::mentee_device_views(
                pixels.as_ptr(),
                words.as_ptr(),
                *widest,
                normalise.as_ptr().cast(),
                scratch.as_mut_ptr(),
                out.as_mut_ptr(),
            ))
        }?;
        out.f_permute([0, 3, 1, 2]).map_err(TorchError::of)
    }
}

/// How a device computes.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Whether convolutions try all their algorithms for the shapes that come and keep the fastest.
    pub autotune: bool,
    /// Whether f32 products may round their operands to 19 bits.
    pub tf32: bool,
}

/// Makes `device` the one of this thread, and sets how devices compute.
///
/// # Errors
/// When there is no such device.
pub fn use_device(device: usize, settings: Settings) -> Result<(), TorchError> {
    let Settings { autotune, tf32 } = settings;
    // SAFETY: no pointers.
    unsafe { check(sys::mentee_device_use(number(device), autotune.into(), tf32.into())) }
}

fn number(device: usize) -> i32 {
    i32::try_from(device).unwrap_or(i32::MAX)
}

/// The device's compute capability: 9 and 0 of an H100.
///
/// # Errors
/// When there is no such device.
pub fn capability(device: usize) -> Result<(i32, i32), TorchError> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the results outlive the call.
    unsafe { check(sys::mentee_device_capability(number(device), &mut major, &mut minor)) }?;
    Ok((major, minor))
}

/// Where the device sits on its machine: PCI domain, bus and device, the same for every process that uses it.
///
/// # Errors
/// When there is no such device.
pub fn slot(device: usize) -> Result<[i32; 3], TorchError> {
    let mut slot = [0; 3];
    // SAFETY: the result has room for three and outlives the call.
    unsafe { check(sys::mentee_device_slot(number(device), slot.as_mut_ptr())) }?;
    Ok(slot)
}

/// Waits until the device has done all it was given.
///
/// # Errors
/// What the device reports.
pub fn synchronise(device: usize) -> Result<(), TorchError> {
    // SAFETY: no pointers.
    unsafe { check(sys::mentee_device_synchronise(number(device))) }
}

/// The most device memory that tensors have taken since the start, bytes.
///
/// # Errors
/// When the allocator has no such device.
pub fn peak_bytes(device: usize) -> Result<i64, TorchError> {
    let mut bytes = 0;
    // SAFETY: the result outlives the call.
    unsafe { check(sys::mentee_device_peak(number(device), &mut bytes)) }?;
    Ok(bytes)
}

/// A queue of work on a device, from libtorch's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    device: usize,
    id: i64,
}

impl Stream {
    /// One that nobody else here uses.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn new(device: usize) -> Result<Self, TorchError> {
        let mut id = 0;
        // SAFETY: the result outlives the call.
        unsafe { check(sys::mentee_stream_new(number(device), &mut id)) }?;
        Ok(Self { device, id })
    }

    /// The one that this thread's work goes to, and CUDA's handle of it.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn current(device: usize) -> Result<(Self, *mut std::ffi::c_void), TorchError> {
        let (mut id, mut handle) = (0, std::ptr::null_mut());
        // SAFETY: the results outlive the call.
        unsafe { check(sys::mentee_stream_current(number(device), &mut id, &mut handle)) }?;
        Ok((Self { device, id }, handle))
    }

    /// Waits on the host for all that is on it.
    ///
    /// # Errors
    /// What the device reports.
    pub fn synchronise(self) -> Result<(), TorchError> {
        // SAFETY: no pointers.
        unsafe { check(sys::mentee_stream_synchronise(number(self.device), self.id)) }
    }

    /// Sends this thread's work here from now on; returns where it went.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn enter(self) -> Result<Self, TorchError> {
        let mut previous = 0;
        // SAFETY: the result outlives the call.
        unsafe { check(sys::mentee_stream_use(number(self.device), self.id, &mut previous)) }?;
        Ok(Self { device: self.device, id: previous })
    }
}

/// Why there is no [`Graph`].
#[derive(Debug)]
pub enum NotRecorded<E> {
    /// The work failed, or recording did not begin: the device is as it was.
    Refused(E),
    /// The recording did not end. libtorch's allocator then believes that it goes on, and neither gives memory back nor lets
    /// libraries look for their fastest algorithms: nothing more can be done on the device.
    Broken(TorchError),
}

/// Work of one stream, recorded once and launched at a stroke: what it reads and writes are always the same places.
#[derive(Debug)]
pub struct Graph(*mut std::ffi::c_void);

// SAFETY: a graph may be launched from any thread, one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Whether this libtorch can record graphs; none can before [`open`].
    #[must_use]
    pub fn is_supported() -> bool {
        // SAFETY: no pointers.
        unsafe { sys::mentee_graph_found() != 0 }
    }

    /// Records what `work` puts on this thread's stream, which is not the device's default one and has done the same work
    /// before; nothing of it is done yet. Tensors that `work` makes stay where they are, and each launch fills them again.
    ///
    /// # Errors
    /// [`NotRecorded`]; when `work` does something that cannot be recorded, such as waiting for the device, the second.
    pub fn record<T, E: From<TorchError>>(
        device: usize,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<(Self, T), NotRecorded<E>> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: on success `graph` is ours, and dropped once.
        let begun = unsafe { check(sys::mentee_graph_begin(number(device), &mut graph)) };
        begun.map_err(|error| NotRecorded::Refused(error.into()))?;
        let graph = Self(graph);
        let done = work();
        // SAFETY: the graph is alive.
        unsafe { check(sys::mentee_graph_end(graph.0)) }.map_err(NotRecorded::Broken)?;
        Ok((graph, done.map_err(NotRecorded::Refused)?))
    }

    /// Puts the recorded work on this thread's stream.
    ///
    /// # Errors
    /// What the device reports.
    pub fn launch(&self) -> Result<(), TorchError> {
        // SAFETY: the graph is alive.
        unsafe { check(sys::mentee_graph_launch(self.0)) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `record`, dropped once; waits until the device is done with it.
        unsafe { sys::mentee_graph_drop(self.0) };
    }
}

/// A point on a stream.
#[derive(Debug)]
pub struct Event {
    event: *mut std::ffi::c_void,
    device: usize,
}

// SAFETY: CUDA's events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above; an event stays where it was recorded.
unsafe impl Sync for Event {}

impl Event {
    /// Behind everything that is on the stream by now.
    ///
    /// # Errors
    /// What the device reports.
    pub fn record(stream: Stream) -> Result<Self, TorchError> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the event is made by the call and dropped once, below.
        unsafe { check(sys::mentee_event_record(&mut event, number(stream.device), stream.id)) }?;
        Ok(Self { event, device: stream.device })
    }

    /// What comes on the stream from now on waits for this point.
    ///
    /// # Errors
    /// What the device reports.
    pub fn block(&self, stream: Stream) -> Result<(), TorchError> {
        // SAFETY: the event is alive.
        unsafe { check(sys::mentee_event_block(self.event, number(stream.device), stream.id)) }
    }

    /// Whether the stream has passed it.
    ///
    /// # Errors
    /// What the device reports.
    pub fn is_complete(&self) -> Result<bool, TorchError> {
        let mut complete = 0;
        // SAFETY: the event is alive; the result outlives the call.
        unsafe { check(sys::mentee_event_query(self.event, &mut complete)) }?;
        Ok(complete != 0)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `record`, dropped once.
        unsafe { sys::mentee_event_drop(self.event, number(self.device)) };
    }
}

/// The file in the same folder; else whatever the loader finds.
fn part_beside(libtorch: Option<&Path>) -> PathBuf {
    libtorch.map_or_else(|| PathBuf::from(CUDA_PART), |file| file.with_file_name(CUDA_PART))
}

fn open_part(file: &Path) -> Result<(), NoCuda> {
    // Global, as Python's torch has it: what is loaded later looks for libtorch's symbols.
    // SAFETY: runs libtorch's own initialisers.
    match unsafe { Library::open(Some(file), RTLD_NOW | RTLD_GLOBAL) } {
        Ok(library) => {
            // Its kernels are registered with the CPU part: never unloaded.
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => Err(NoCuda::NoLibrary { file: file.to_owned(), reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_beside_is_meant() {
        let libtorch = Path::new("/somewhere/lib/libtorch_cpu.so");
        assert_eq!(part_beside(Some(libtorch)), Path::new("/somewhere/lib/libtorch_cuda.so"));
        assert_eq!(part_beside(None), Path::new(CUDA_PART));
    }

    #[test]
    fn a_part_that_is_missing_is_named() {
        let error = open_part(Path::new("/nowhere/libtorch_cuda.so")).expect_err("no such file").to_string();
        assert!(error.starts_with("/nowhere/libtorch_cuda.so: "), "{error}");
        assert!(error.contains("install torch with its CUDA libraries"), "{error}");
    }

    #[test]
    fn the_kernels_compile_for_the_devices_there_are() {
        for architecture in ["sm_80", "sm_90", "sm_100"] {
            for part in ["flat", "bf16", "f32", "f64", "views"] {
                let bytes = compile(part, architecture).unwrap_or_else(|error| {
                    panic!("{error} (the tests' NVRTC comes with ci/setup --python)")
                });
                assert!(bytes > 1000, "{part} for {architecture}: {bytes} bytes");
            }
        }
        for unknown in ["sm_999", "sm_99"] {
            assert!(compile("flat", unknown).is_ok(), "{unknown} gets what every later device understands");
        }
        for part in ["flat", "f32", "views"] {
            assert!(compile(part, "sm_75").is_ok(), "{part} needs no bf16");
        }
        let error = compile("flat", "sm_1").expect_err("no such device").to_string();
        assert!(error.contains("NVRTC") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn without_a_driver_nothing_is_opened() {
        match open() {
            Err(NoCuda::NoDriver) => {
                let mapped = std::fs::read_to_string("/proc/self/maps").expect("Linux has it");
                assert!(!mapped.contains(CUDA_PART));
            }
            // On a machine with a driver: as many as there are, or the reason why they cannot be used.
            Ok(devices) => assert_eq!(i64::from(devices), tch::Cuda::device_count()),
            Err(NoCuda::NoLibrary { reason, .. }) => assert!(!reason.is_empty()),
        }
    }
}
