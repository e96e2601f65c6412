//! What a sender of images sends who knows the protocol: well-formed frames in a likely order with
//! any numbers, of which some bytes may then be changed. Reaches deep into a session, where random
//! bytes hardly ever get.
#![no_main]

mod choices;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use pageferry_migrate::{
    core::{
        Counts, DataHeader, Encoder, Frame, ImageBegin, ImageCounts, ImageEnd, ImageId,
        ImageStored, WireSpan,
    },
    fuzz,
};

const PAGE: u64 = 4096;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input { choices: Unstructured::new(data), bytes: Vec::new(), page: 0 };
    while !input.choices.is_empty() && input.bytes.len() < 1 << 20 {
        // Out of choices in the middle of a frame: what there is by then is sent.
        if input.append().is_err() {
            break;
        }
    }
    fuzz::images(&input.bytes);
});

struct Input<'a> {
    choices: Unstructured<'a>,
    bytes: Vec<u8>,
    /// A page that may probably come next.
    page: u64,
}

impl Input<'_> {
    /// One frame, or a change to what was sent before.
    fn append(&mut self) -> Result<()> {
        let frame = match self.choices.int_in_range(0..=19_u8)? {
            0..=2 => {
                self.page = 0;
                Frame::ImageBegin(self.begin()?)
            }
            3 => {
                let (offset, bytes) = self.chunk()?;
                Frame::ImageMetadata { offset, bytes }
            }
            4 => {
                let (offset, bytes) = self.chunk()?;
                Frame::ImageMappings { offset, bytes }
            }
            5..=8 => return self.data(),
            9 | 10 => Frame::Zero { span: self.span()? },
            11 => Frame::Poison { span: self.span()? },
            12 => Frame::Gone { span: self.span()? },
            // Made to fit where the digest is zero.
            13..=15 => Frame::ImageEnd(ImageEnd {
                counts: self.counts()?,
                frames: [0; 32],
                pages: if self.choices.ratio(7, 8)? {
                    [0; 32]
                } else {
                    self.choices.arbitrary()?
                },
            }),
            16 => Frame::abort(self.choices.arbitrary()?),
            17 => Frame::ImageStored(ImageStored { id: self.id()?, counts: self.counts()? }),
            18 => match self.choices.int_in_range(0..=3_u8)? {
                0 => Frame::Ping { nonce: 1 },
                1 => Frame::Pong { nonce: 1 },
                2 => Frame::Bye,
                _ => {
                    let (filled, poisoned) = (self.near(4)?, self.near(4)?);
                    Frame::Complete(Counts { filled, poisoned })
                }
            },
            _ => {
                if !self.bytes.is_empty() {
                    let at = self.choices.choose_index(self.bytes.len())?;
                    self.bytes[at] = self.choices.arbitrary()?;
                }
                return Ok(());
            }
        };
        Encoder::encode(&frame, &mut self.bytes);
        Ok(())
    }

    fn data(&mut self) -> Result<()> {
        let span = self.span()?;
        let whole = u64::from(span.count).wrapping_mul(PAGE) as u32;
        let length = if self.choices.ratio(7, 8)? { whole } else { self.choices.arbitrary()? };
        let fragment = if self.choices.ratio(1, 16)? { Some(self.near(PAGE)?) } else { None };
        self.bytes.extend(Encoder::data(&DataHeader { span, length, fragment }));
        choices::payload(&mut self.choices, length, &mut self.bytes)
    }

    fn near(&mut self, edge: u64) -> Result<u64> {
        choices::near(&mut self.choices, edge)
    }

    fn span(&mut self) -> Result<WireSpan> {
        let region = if self.choices.ratio(31, 32)? { 0 } else { self.choices.arbitrary()? };
        let first = if self.choices.ratio(15, 16)? {
            self.page + self.choices.int_in_range(0..=2)?
        } else {
            self.near(u64::MAX / PAGE)?
        };
        let count = self.near(16)? as u32;
        self.page = first.saturating_add(count.into()).min(1 << 60);
        Ok(WireSpan { region, first, count })
    }

    fn id(&mut self) -> Result<ImageId> {
        Ok(ImageId([self.choices.int_in_range(0..=5)?; 16]))
    }

    fn counts(&mut self) -> Result<ImageCounts> {
        let (data, zero) = (self.near(16)?, self.near(16)?);
        Ok(ImageCounts { data, zero, poisoned: self.near(4)?, gone: self.near(4)? })
    }

    fn begin(&mut self) -> Result<ImageBegin> {
        let parent = if self.choices.arbitrary()? { Some(self.id()?) } else { None };
        let usual = self.choices.ratio(7, 8)?;
        Ok(ImageBegin {
            id: self.id()?,
            parent,
            page_size: if usual { PAGE } else { self.near(64 << 10)? },
            metadata_len: if usual { 0 } else { self.near(1 << 20)? as u32 },
            mappings_len: if usual { 0 } else { self.near(16)? as u32 },
        })
    }

    fn chunk(&mut self) -> Result<(u64, Vec<u8>)> {
        let length = self.choices.int_in_range(1..=20_usize)?;
        let filling = self.choices.arbitrary()?;
        Ok((self.near(16)?, vec![filling; length]))
    }
}
