//! mentee-torch-ext
