//! Methods: which networks there are and what the student is asked to predict. One file each.

mod byol;
mod mocov3;
mod simsiam;

use mentee_config::recipe::{self, MethodName, Recipe};
use tch::Tensor;

use crate::SslError;
use crate::encoder::ResNet;
use crate::head::Mlp;
use crate::layers::Pass;
use crate::layout::Declarations;

/// The networks of a method; the teacher is the first two on weights of its own.
#[derive(Debug, Clone)]
pub struct Networks {
    /// Images to features.
    pub backbone: ResNet,
    /// Features to the space the loss compares in.
    pub projector: Mlp,
    /// Student projections to teacher projections; none when the recipe leaves it out.
    pub predictor: Option<Mlp>,
}

impl Networks {
    /// z: [V·N, 3, H, W] to [V·N, D].
    pub fn project(&self, pass: &Pass, views: &Tensor) -> Result<Tensor, SslError> {
        pass.run(views, |views| {
            let features = self.backbone.forward(pass, views)?;
            pass.has_features(&features);
            self.projector.forward(pass, &features)
        })
    }

    /// p: [V·N, D] to [V·N, D]; the projection itself without a predictor.
    pub fn predict(&self, pass: &Pass, z: &Tensor) -> Result<Tensor, SslError> {
        match &self.predictor {
            Some(predictor) => pass.run(z, |z| predictor.forward(pass, z)),
            None => Ok(z.shallow_clone()),
        }
    }
}

/// What a forward pass yields.
#[derive(Debug)]
pub struct StepLoss {
    /// This rank's share of the mean over the global batch: the ranks' shares add up to the loss.
    pub loss: Tensor,
    /// The student's projections, without a graph: [V·N, D].
    pub projections: Tensor,
    /// The student's features, without a graph, where the state keeps them: [V·N, feature_dim].
    pub features: Option<Tensor>,
}

impl StepLoss {
    /// Of this rank's share of the loss and the student's projections.
    pub fn new(loss: Tensor, projections: &Tensor) -> Self {
        Self { loss, projections: projections.detach(), features: None }
    }

    /// The same values, without a way back to what they were made of.
    #[must_use]
    pub fn without_graph(&self) -> Self {
        Self {
            loss: self.loss.detach(),
            projections: self.projections.detach(),
            features: self.features.as_ref().map(Tensor::detach),
        }
    }

    /// The same tensors again.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self {
            loss: self.loss.shallow_clone(),
            projections: self.projections.shallow_clone(),
            features: self.features.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// What the micro-batches of one update yield together.
    pub fn sum(parts: &[StepLoss]) -> Result<StepLoss, SslError> {
        let losses: Vec<Tensor> = parts.iter().map(|part| part.loss.detach()).collect();
        let projections: Vec<&Tensor> = parts.iter().map(|part| &part.projections).collect();
        Ok(StepLoss {
            loss: Tensor::f_stack(&losses, 0)?.f_sum(None)?,
            projections: Tensor::f_cat(&projections, 0)?,
            features: None, // of each part by itself
        })
    }
}

/// A self-distillation method.
pub trait Method {
    /// Its networks.
    fn networks(&self) -> &Networks;

    /// The loss of both views ([V·N, 3, H, W]); `teacher` is none when the student is its own teacher.
    fn loss(
        &self,
        student: &Pass,
        teacher: Option<&Pass>,
        views: &Tensor,
        global_batch: u64,
    ) -> Result<StepLoss, SslError>;
}

/// The method a recipe names, with its networks declared.
pub fn new(recipe: &Recipe, d: &mut Declarations) -> Box<dyn Method> {
    let backbone = ResNet::new(d, &recipe.model);
    match recipe.method.name {
        MethodName::Mocov3 => Box::new(mocov3::MocoV3::new(&recipe.method, backbone, d)),
        MethodName::Byol => Box::new(byol::Byol::new(&recipe.method, backbone, d)),
        MethodName::Simsiam => Box::new(simsiam::Simsiam::new(&recipe.method, backbone, d)),
    }
}

/// What the student is compared with: the teacher's projections, or its own when it is its own teacher, through
/// which gradients flow only if the recipe asks for it.
fn target(
    networks: &Networks,
    settings: &recipe::Method,
    teacher: Option<&Pass>,
    views: &Tensor,
    z: &Tensor,
) -> Result<Tensor, SslError> {
    match teacher {
        Some(teacher) => teacher.beside(|| tch::no_grad(|| networks.project(teacher, views))),
        None if settings.stop_gradient => Ok(z.detach()),
        None => Ok(z.shallow_clone()),
    }
}
