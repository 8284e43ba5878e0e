//! mentee-collectives
