//! mentee-data
