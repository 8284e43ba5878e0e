//! What a run is: recipes (what a user writes), the resolved plan (what really runs), their errors.
#![expect(missing_docs, reason = "fields whose name and type say it all")]

pub mod recipe;
