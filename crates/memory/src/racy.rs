//! Copying bytes from and to memory that others change at the same time.
//!
//! The memory of a guest is written by vCPUs, by the kernel and by other threads whenever they
//! like. No Rust reference to it may therefore exist, and every access is an atomic one: whole
//! aligned words where possible, single bytes at the edges. A copy is no snapshot: it may see one
//! word from before, and the next from after a concurrent write.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

const WORD: usize = size_of::<u64>();

/// Copies `dst.len()` bytes from `src` to `dst`.
///
/// # Safety
///
/// `src` is mapped and readable for `dst.len()` bytes during the call, and no Rust reference to
/// those bytes exists.
pub(crate) unsafe fn copy_from(src: *mut u8, dst: &mut [u8]) {
    let head = src.align_offset(WORD).min(dst.len());
    let (dst_head, dst_rest) = dst.split_at_mut(head);
    for (i, byte) in dst_head.iter_mut().enumerate() {
        // SAFETY: `i` is below `dst.len()`, for which the caller vouches.
        *byte = unsafe { AtomicU8::from_ptr(src.add(i)) }.load(Relaxed);
    }
    let words = dst_rest.len() / WORD;
    let (dst_words, dst_tail) = dst_rest.split_at_mut(words * WORD);
    for (i, bytes) in dst_words.chunks_exact_mut(WORD).enumerate() {
        // SAFETY: the word ends at most at `dst.len()`, for which the caller vouches, and is
        // aligned, as the `head` bytes before the first one were chosen so.
        let word = unsafe { AtomicU64::from_ptr(src.add(head + i * WORD).cast()) }.load(Relaxed);
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    for (i, byte) in dst_tail.iter_mut().enumerate() {
        // SAFETY: these are the last bytes of the `dst.len()`, for which the caller vouches.
        *byte = unsafe { AtomicU8::from_ptr(src.add(head + words * WORD + i)) }.load(Relaxed);
    }
}

/// Copies `src` to `dst`.
///
/// # Safety
///
/// `dst` is mapped and writable for `src.len()` bytes during the call, and no Rust reference to
/// those bytes exists.
pub(crate) unsafe fn copy_to(dst: *mut u8, src: &[u8]) {
    let head = dst.align_offset(WORD).min(src.len());
    let (src_head, src_rest) = src.split_at(head);
    for (i, byte) in src_head.iter().enumerate() {
        // SAFETY: `i` is below `src.len()`, for which the caller vouches.
        unsafe { AtomicU8::from_ptr(dst.add(i)) }.store(*byte, Relaxed);
    }
    let words = src_rest.len() / WORD;
    let (src_words, src_tail) = src_rest.split_at(words * WORD);
    for (i, bytes) in src_words.chunks_exact(WORD).enumerate() {
        let mut word = [0; WORD];
        word.copy_from_slice(bytes);
        // SAFETY: the word ends at most at `src.len()`, for which the caller vouches, and is
        // aligned, as the `head` bytes before the first one were chosen so.
        unsafe { AtomicU64::from_ptr(dst.add(head + i * WORD).cast()) }
            .store(u64::from_ne_bytes(word), Relaxed);
    }
    for (i, byte) in src_tail.iter().enumerate() {
        // SAFETY: these are the last bytes of the `src.len()`, for which the caller vouches.
        unsafe { AtomicU8::from_ptr(dst.add(head + words * WORD + i)) }.store(*byte, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_every_alignment_and_length() {
        for start in 0..2 * WORD {
            for len in 0..4 * WORD {
                let mut memory = [0xee_u8; 8 * WORD];
                let wanted: Vec<u8> = (1..=len as u8).collect();
                let base = memory.as_mut_ptr();
                let mut read = vec![0; len];
                // SAFETY: `start + len` is below the array's length, and the array is not touched
                // in another way in between.
                unsafe {
                    copy_to(base.add(start), &wanted);
                    copy_from(base.add(start), &mut read);
                }
                assert_eq!(read, wanted, "start {start}");
                assert_eq!(memory[start..start + len], wanted, "start {start}");
                assert!(memory[..start].iter().all(|byte| *byte == 0xee));
                assert!(memory[start + len..].iter().all(|byte| *byte == 0xee));
            }
        }
    }
}
