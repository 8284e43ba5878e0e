//! mentee-checkpoint
