//! What the other side of a guest's migration sends who knows the protocol: well-formed frames in a
//! likely order with any numbers, of which some bytes may then be changed. Reaches the phases in
//! which a guest changes hands, where random bytes hardly ever get.
#![no_main]

mod choices;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use pageferry_migrate::{
    core::{
        AcceptedRegion, Belief, Codec, Counts, DataHeader, Encoder, Frame, PackedHeader, Refusal,
        RefusalCode, RegionInfo, StateInfo, StateName, UnitRun, WireSpan,
    },
    fuzz,
};

const PAGE: u64 = 4096;
const UNITS: u64 = 64;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input =
        Input { choices: Unstructured::new(data), bytes: Vec::new(), next: 0, round: 0 };
    while !input.choices.is_empty() && input.bytes.len() < 1 << 20 {
        // Out of choices in the middle of a frame: what there is by then is sent.
        if input.append().is_err() {
            break;
        }
    }
    fuzz::guests(&input.bytes);
});

struct Input<'a> {
    choices: Unstructured<'a>,
    bytes: Vec<u8>,
    /// What of the usual order comes next.
    next: usize,
    round: u64,
}

impl Input<'_> {
    /// One frame, or a change to what was sent before.
    fn append(&mut self) -> Result<()> {
        let frame = match self.choices.int_in_range(0..=24_u8)? {
            0..=9 => self.usual()?,
            10 | 11 => Frame::Zero { span: self.span()? },
            12 => return self.data(),
            13 => return self.packed(),
            14 => Frame::Poison { span: self.span()? },
            15 => Frame::Request { span: self.span()?, prefetch: self.choices.arbitrary()? },
            16 => Frame::Expedite { span: self.span()? },
            17 => Frame::Ping { nonce: self.choices.int_in_range(0..=2)? },
            18 => Frame::Have { region: 0, runs: self.runs()? },
            19 => Frame::HaveEnd { present: self.near(UNITS)?, poisoned: self.near(4)? },
            20 => Frame::Complete(Counts { filled: self.near(UNITS)?, poisoned: self.near(4)? }),
            21 => self.decision()?,
            22 => Frame::Missing { region: 0, runs: self.runs()? },
            23 => Frame::RoundAck { round: self.near(2)?, units: self.near(UNITS)? },
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

    /// A migration as it should be, of both sides' frames: each side refuses the other's and goes
    /// on with a new link where it can, or what fits is taken.
    fn usual(&mut self) -> Result<Frame> {
        let name = StateName::new("fuzz").expect("it is short");
        self.next += 1;
        Ok(match self.next {
            1 => Frame::Regions(vec![RegionInfo {
                id: 0,
                flags: 0,
                guest_base: 0,
                length: UNITS * PAGE,
                granule: PAGE,
                page_size: PAGE,
            }]),
            2 if self.choices.ratio(1, 2)? => {
                self.next = 1;
                self.round += 1;
                Frame::RoundBegin { round: self.round, units: self.near(UNITS)? }
            }
            3 => Frame::StateBegin(StateInfo::of(name, 1, b"x")),
            4 => Frame::State { offset: 0, bytes: b"x".to_vec() },
            5 => Frame::Missing { region: 0, runs: vec![UnitRun { first: 0, count: UNITS }] },
            6 => Frame::Switch { round: self.round, missing: UNITS },
            7 => Frame::Run,
            8 => Frame::Zero { span: WireSpan { region: 0, first: 0, count: UNITS as u32 } },
            9 => Frame::CompleteAck(Counts { filled: UNITS, poisoned: 0 }),
            2 | 10 => {
                let granule = PAGE << self.choices.int_in_range(0..=3_u8)?;
                Frame::Accept(vec![AcceptedRegion { id: 0, granule }])
            }
            11 => Frame::Ready { missing: UNITS },
            12 => Frame::Running,
            _ => {
                self.next = 0;
                Frame::RoundEnd { round: self.round, units: self.near(UNITS)? }
            }
        })
    }

    fn decision(&mut self) -> Result<Frame> {
        Ok(match self.choices.int_in_range(0..=9_u8)? {
            0 => Frame::Run,
            1 => Frame::Running,
            2 => Frame::Dropped,
            3 => Frame::Resume(Belief::Given),
            4 => Frame::Resume(Belief::Running),
            5 => Frame::Cancelled,
            6 => Frame::Bye,
            7 => Frame::Ready { missing: self.near(UNITS)? },
            8 => Frame::Cancel(Refusal::new(RefusalCode::Asked, self.choices.arbitrary()?)),
            _ => Frame::Error(Refusal::new(
                RefusalCode::Other(self.choices.arbitrary()?),
                self.choices.arbitrary()?,
            )),
        })
    }

    fn data(&mut self) -> Result<()> {
        let span = self.span()?;
        let whole = u64::from(span.count).wrapping_mul(PAGE) as u32;
        let length = if self.choices.ratio(7, 8)? { whole } else { self.choices.arbitrary()? };
        let fragment = if self.choices.ratio(1, 4)? { Some(self.near(PAGE)?) } else { None };
        self.bytes.extend(Encoder::data(&DataHeader { span, length, fragment }));
        choices::payload(&mut self.choices, length, &mut self.bytes)
    }

    fn packed(&mut self) -> Result<()> {
        let codec = *self.choices.choose(&Codec::ALL)?;
        let header = PackedHeader { span: self.span()?, codec, length: self.near(PAGE)? as u32 };
        self.bytes.extend(Encoder::packed(&header));
        choices::payload(&mut self.choices, header.length, &mut self.bytes)
    }

    fn near(&mut self, edge: u64) -> Result<u64> {
        choices::near(&mut self.choices, edge)
    }

    fn span(&mut self) -> Result<WireSpan> {
        let region = if self.choices.ratio(31, 32)? { 0 } else { self.choices.arbitrary()? };
        if self.choices.ratio(3, 4)? {
            let first = self.choices.int_in_range(0..=15)? * 4;
            return Ok(WireSpan { region, first, count: 4 });
        }
        Ok(WireSpan { region, first: self.near(UNITS)?, count: self.near(16)? as u32 })
    }

    fn runs(&mut self) -> Result<Vec<UnitRun>> {
        let n = self.choices.int_in_range(1..=3)?;
        let mut runs: Vec<UnitRun> = (0..n)
            .map(|_| {
                let span = self.span()?;
                Ok(UnitRun { first: span.first, count: span.count.into() })
            })
            .collect::<Result<_>>()?;
        if self.choices.ratio(7, 8)? {
            runs.sort_unstable_by_key(|run| run.first);
        }
        Ok(runs)
    }
}
