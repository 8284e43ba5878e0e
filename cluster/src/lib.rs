//! mentee-cluster
