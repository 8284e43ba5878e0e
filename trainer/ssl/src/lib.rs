//! mentee-ssl
