//! The memory of a batch, which goes round: it is filled, used, given back and filled again. A device copies faster from memory
//! that the system never moves: what holds it in place ([`Memory::hold`]) stays with it, and is let go before the memory is.

use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut};

/// Floats of a batch.
#[derive(Default)]
pub struct Memory {
    // Dropped before the floats.
    holder: Option<Box<dyn Any + Send + Sync>>,
    floats: Vec<f32>,
}

impl Memory {
    /// Holds the memory in place by what `holder` makes of its address, once as long as it is not grown.
    ///
    /// # Errors
    /// Whatever `holder` says: the memory is as before.
    pub fn hold<H: Any + Send + Sync, E>(
        &mut self,
        holder: impl FnOnce(*mut f32, usize) -> Result<H, E>,
    ) -> Result<(), E> {
        if self.holder.is_none() && !self.floats.is_empty() {
            self.holder = Some(Box::new(holder(self.floats.as_mut_ptr(), self.floats.len())?));
        }
        Ok(())
    }

    /// Makes it `len` long. What it holds then is what it held, and zeros.
    pub(crate) fn resize(&mut self, len: usize) {
        if len != self.floats.len() {
            self.holder = None;
        }
        self.floats.resize(len, 0.0);
    }

    /// Where it begins. No reference to the floats is made: parts of them may be in use.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.floats.as_mut_ptr()
    }

    /// The floats, in their own memory.
    pub(crate) fn into_vec(mut self) -> Vec<f32> {
        self.holder = None;
        std::mem::take(&mut self.floats)
    }
}

impl Deref for Memory {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.floats
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.floats
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.floats.fmt(f)
    }
}

impl Clone for Memory {
    fn clone(&self) -> Self {
        Self { holder: None, floats: self.floats.clone() }
    }
}

impl PartialEq for Memory {
    fn eq(&self, other: &Self) -> bool {
        self.floats == other.floats
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn memory_is_held_until_it_is_given_up_or_grown() {
        let mut memory = Memory::default();
        let held = Arc::new(());
        let hold =
            |memory: &mut Memory| memory.hold(|_, len| if len == 6 { Ok(held.clone()) } else { Err(len) });
        assert_eq!(hold(&mut memory), Ok(()));
        memory.resize(4);
        assert_eq!((hold(&mut memory), Arc::strong_count(&held)), (Err(4), 1));
        memory.resize(6);
        assert_eq!((hold(&mut memory), hold(&mut memory), Arc::strong_count(&held)), (Ok(()), Ok(()), 2));
        memory.resize(6);
        assert_eq!((memory.clone(), Arc::strong_count(&held)), (memory.clone(), 2));
        memory.resize(600);
        assert_eq!(Arc::strong_count(&held), 1, "its place is another now");
        memory.resize(6);
        hold(&mut memory).unwrap();
        assert_eq!((memory.into_vec(), Arc::strong_count(&held)), (vec![0.0; 6], 1));
    }
}
