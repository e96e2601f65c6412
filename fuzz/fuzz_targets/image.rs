//! An image file: any bytes, as they are and with digests that fit.
#![no_main]

use pageferry_image::fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = fuzz::read(data.to_vec());
    let mut sealed = data.to_vec();
    fuzz::reseal(&mut sealed);
    let _ = fuzz::read(sealed);
});
