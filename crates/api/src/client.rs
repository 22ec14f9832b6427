//! The client: stub.
