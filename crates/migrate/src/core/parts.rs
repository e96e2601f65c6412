//! Granules that come in parts.

use super::{DataHeader, ProtocolError, WireSpan};

/// A granule that has come in part.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
struct Begun {
    span: WireSpan,
    next: u64,
}

/// The order of answers on one connection: the parts of a granule from 0 on without a gap, and no
/// other answer among them.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Parts {
    begun: Option<Begun>,
}

impl Parts {
    /// Whether a granule has come in part.
    pub(super) fn begun(&self) -> bool {
        self.begun.is_some()
    }

    fn whole(&self, what: &'static str) -> Result<(), ProtocolError> {
        match self.begun {
            None => Ok(()),
            Some(Begun { span, next }) => Err(ProtocolError::Fragment {
                region: span.region,
                granule: span.first,
                expected: next,
                what,
            }),
        }
    }

    /// Takes note of data, of granules of `granule_len` bytes.
    pub(super) fn data(
        &mut self,
        data: &DataHeader,
        granule_len: u64,
    ) -> Result<(), ProtocolError> {
        let Some(offset) = data.fragment else {
            return self.whole("another granule's data");
        };
        let due = self.begun.unwrap_or(Begun { span: data.span, next: 0 });
        if (due.span, due.next) != (data.span, offset) {
            return Err(ProtocolError::Fragment {
                region: due.span.region,
                granule: due.span.first,
                expected: due.next,
                what: "another part",
            });
        }
        let next = offset + u64::from(data.length);
        self.begun = (next < granule_len).then_some(Begun { next, ..due });
        Ok(())
    }

    /// Takes note of an answer of zeros, or of packed bytes.
    pub(super) fn zero(&self) -> Result<(), ProtocolError> {
        self.whole("another answer")
    }

    /// Takes note of a poisoned span; returns whether it ends the granule that has come in part.
    pub(super) fn poison(&mut self, span: WireSpan) -> Result<bool, ProtocolError> {
        let ends = self.begun.is_some_and(|begun| begun.span == span);
        if ends {
            self.begun = None;
        }
        self.whole("a poison answer")?;
        Ok(ends)
    }
}
