//! An image that is well formed, of which some fields are then changed to any numbers while all
//! digests fit. Reaches what random bytes hardly ever get to, and checks that what was told is read
//! again where nothing was changed.
#![no_main]

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use pageferry_image::{Encoder, ImageRange, WriterOptions, fuzz};
use pageferry_memory::{ImageOffset, PageSize};

const PAGE: u64 = 4096;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // Out of choices: what there is by then is read.
    let _ = run(&mut Unstructured::new(data));
});

fn run(choices: &mut Unstructured<'_>) -> Result<()> {
    let shift = choices.int_in_range(0..=2_u32)?;
    let block = PAGE << shift;
    let size = PageSize::try_new(block).expect("a power of two");
    let mut encoder = Encoder::new(Vec::new(), "fuzzed", WriterOptions::new(size))
        .expect("a vector takes everything");
    for _ in 0..choices.int_in_range(0..=12)? {
        let first = u64::from(choices.arbitrary::<u8>()?);
        let count = choices.int_in_range(1..=4_u64)?;
        let at = ImageOffset::new(first * block);
        let range = ImageRange::new(at, count * block);
        let told = match choices.int_in_range(0..=3_u8)? {
            0 => encoder.zero(range),
            1 => encoder.poison(range),
            2 => encoder.gone(range),
            _ => {
                let byte = choices.int_in_range(0..=3_u8)?;
                encoder.write(at, &vec![byte; (count * block) as usize])
            }
        };
        told.expect("it is aligned");
    }
    encoder.set_metadata("key", choices.arbitrary::<[u8; 4]>()?).expect("it is short");
    let (mut bytes, _) = encoder.finish().expect("a vector takes everything");
    fuzz::read(bytes.clone()).expect("it is as it was written");

    let changes = choices.int_in_range(1..=4)?;
    for _ in 0..changes {
        // The header's fields, or the index and the footer.
        let index = bytes.len().saturating_sub(1024).max(4096);
        let at = if choices.ratio(1, 4)? {
            choices.int_in_range(8..=400)?
        } else {
            choices.int_in_range(index..=bytes.len() - 8)?
        };
        let width = *choices.choose(&[1, 2, 4, 8])?;
        let value: u64 = if choices.arbitrary()? {
            1 << choices.int_in_range(0..=63_u32)?
        } else {
            choices.arbitrary()?
        };
        bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    }
    fuzz::reseal(&mut bytes);
    let _ = fuzz::read(bytes);
    Ok(())
}
