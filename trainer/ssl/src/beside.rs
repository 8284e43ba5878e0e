//! The teacher's pass beside the student's, on a second stream of the device: it needs nothing that the student makes.
//!
//! ```text
//!   this thread's stream  ─┬─ student: project, predict ─────┬─ loss, backward …
//!                     fork ▼                                 │ join
//!   side stream            └─ teacher: project ──────────────┘
//! ```

use std::cell::RefCell;
use std::fmt::Debug;

use mentee_torch_ext::cuda::{Event, Stream};

use crate::SslError;

/// A second stream of this thread's device. Its calls come in turn: fork, enter, join.
///
/// Memory that is freed may be used again at once by later work of the stream it was taken on. So what is made between enter
/// and join is read before the next fork only, and what that work reads is kept until the join.
pub trait SideStream: Debug {
    /// What will be sent to it waits for all that this thread's stream has been given by now, and for nothing later.
    fn fork(&self) -> Result<(), SslError>;

    /// Sends this thread's work to it.
    fn enter(&self) -> Result<(), SslError>;

    /// Sends this thread's work where it went before; what comes there from now on waits for what was sent.
    fn join(&self) -> Result<(), SslError>;
}

/// One of libtorch's streams.
#[derive(Debug)]
pub struct CudaSide {
    device: usize,
    side: Stream,
    forked: RefCell<Option<Event>>,
    left: RefCell<Option<Stream>>,
}

impl CudaSide {
    /// On a device that libtorch has.
    pub fn new(device: usize) -> Result<Self, SslError> {
        let side = Stream::new(device)?;
        Ok(Self { device, side, forked: RefCell::default(), left: RefCell::default() })
    }
}

impl SideStream for CudaSide {
    fn fork(&self) -> Result<(), SslError> {
        let (own, _) = Stream::current(self.device)?;
        self.forked.replace(Some(Event::record(own)?));
        Ok(())
    }

    fn enter(&self) -> Result<(), SslError> {
        // Not before: a recording would not end, if the student's pass failed between.
        if let Some(forked) = self.forked.take() {
            forked.block(self.side)?;
        }
        self.left.replace(Some(self.side.enter()?));
        Ok(())
    }

    fn join(&self) -> Result<(), SslError> {
        if let Some(own) = self.left.take() {
            own.enter()?;
            Event::record(self.side)?.block(own)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use mentee_config::Recipe;
    use tch::{Kind, Tensor};

    use super::*;
    use crate::layers::{OverRanks, Pass, Reduce};
    use crate::method::{Method, Networks, StepLoss};
    use crate::state::{self, State};

    type Log = Arc<Mutex<Vec<&'static str>>>;

    /// Writes down its calls.
    #[derive(Debug, Default)]
    struct Fake(Log);

    impl Fake {
        fn called(&self, what: &'static str) -> Result<(), SslError> {
            self.0.lock().unwrap().push(what);
            Ok(())
        }
    }

    impl SideStream for Fake {
        fn fork(&self) -> Result<(), SslError> {
            self.called("fork")
        }

        fn enter(&self) -> Result<(), SslError> {
            self.called("enter")
        }

        fn join(&self) -> Result<(), SslError> {
            self.called("join")
        }
    }

    /// A method that writes down when it begins.
    struct Watched(Box<dyn Method>, Log);

    impl Method for Watched {
        fn networks(&self) -> &Networks {
            self.0.networks()
        }

        fn loss(
            &self,
            student: &Pass,
            teacher: Option<&Pass>,
            views: &Tensor,
            global_batch: u64,
        ) -> Result<StepLoss, SslError> {
            self.1.lock().unwrap().push("method");
            self.0.loss(student, teacher, views, global_batch)
        }
    }

    /// What a step calls, having checked that its loss is the one without a side stream.
    fn calls(name: &str, over: &OverRanks) -> Vec<&'static str> {
        let mut sets = ["model.backbone=resnet20", "views.size=8", "schedule.global_batch=2"].to_vec();
        let of_method = format!("method.name={name}");
        sets.push(&of_method);
        sets.extend((name == "simsiam").then_some("method.teacher=shared"));
        let sets: Vec<String> = sets.into_iter().map(str::to_owned).collect();
        let recipe = Recipe::load("demo", &sets).unwrap();
        let (method, mut state): (_, State) = state::new(&recipe).unwrap();
        let log = Log::default();
        let method = Watched(method, log.clone());
        let views = Tensor::arange(4 * 3 * 64, (Kind::Float, tch::Device::Cpu)).sin().reshape([4, 3, 8, 8]);
        let mut loss = |side: Option<Box<dyn SideStream>>| {
            log.lock().unwrap().clear();
            state.side = side;
            let out = state.loss(&method, &views, 2, recipe.parallel.norm_statistics, over).unwrap();
            (log.lock().unwrap().clone(), out.loss.double_value(&[]))
        };
        let (without, expected) = loss(None);
        assert_eq!(without, ["method"]);
        let (calls, found) = loss(Some(Box::new(Fake(log.clone()))));
        assert_eq!(found, expected);
        calls
    }

    #[test]
    fn the_teacher_forks_before_the_student_begins_and_joins_before_the_loss() {
        assert_eq!(calls("byol", &OverRanks::ALONE), ["fork", "method", "enter", "join"]);
        assert_eq!(calls("mocov3", &OverRanks::ALONE), ["fork", "method", "enter", "join"]);
    }

    #[test]
    fn one_stream_without_a_teacher_and_where_norms_sum_over_ranks() {
        assert_eq!(calls("simsiam", &OverRanks::ALONE), ["method"]);
        let over = OverRanks { reduce: Some(Reduce::Host(Arc::new(|_: &mut [f64]| true))), gather: None };
        assert_eq!(calls("byol", &over), ["method"]);
    }

    #[test]
    fn streams_are_joined_after_a_failure() {
        let recipe = Recipe::load("demo", &["model.backbone=resnet20".to_owned()]).unwrap();
        let (_, state) = state::new(&recipe).unwrap();
        let fake = Fake::default();
        let mut pass = Pass::eval(&state.student.weights, &state.student.stats);
        pass.on_side(&fake);
        let done: Result<(), SslError> = pass.beside(|| Err(SslError::Gather("no".into())));
        assert_eq!(done.unwrap_err().to_string(), "collecting rows over ranks: no");
        assert_eq!(*fake.0.lock().unwrap(), ["enter", "join"]);
    }
}
