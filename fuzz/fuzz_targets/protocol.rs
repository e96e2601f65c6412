//! What a peer sends: the decoder, and the state machines of both sides behind it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    pageferry_migrate::fuzz::decode(data);
    pageferry_migrate::fuzz::images(data);
    pageferry_migrate::fuzz::guests(data);
});
