//! Backbones: images in, one feature vector each out.

mod resnet;

pub use resnet::ResNet;
