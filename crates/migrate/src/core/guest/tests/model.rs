//! All that can happen between two sides: every interleaving of their steps with losses of the
//! link at every message boundary, new links, cancels, and guests that are dropped or do not start.
//!
//! The two sides are the sessions themselves; what a driver does is modelled by the steps.

use std::collections::{HashMap, VecDeque};

use super::*;

/// What may go wrong or be asked for, and how often.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
struct Budget {
    losses: u8,
    cancels: u8,
    /// The destination's operator drops the guest, or starting it fails.
    drops: u8,
    /// There is a round of pre-copy, which brings everything.
    round: bool,
}

/// Two live processes, and the links between them. Of an old link, what one side sent may still
/// be read by the other until that one notices.
struct World {
    source: GuestSourceSession,
    destination: GuestDestinationSession,
    /// The link that the source uses, and the one that the destination uses.
    links: (u8, u8),
    /// Links that have been made.
    made: u8,
    to_destination: VecDeque<(u8, Frame)>,
    to_source: VecDeque<(u8, Frame)>,
    /// `Have` frames and the standing, which follow one another.
    answers: VecDeque<Frame>,
    budget: Budget,
    /// The guest has run at the destination.
    ran: bool,
    /// How far the source has come in its script.
    said: usize,
}

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
        enum Step {
            $($(#[$doc])* $name,)*
        }

        const STEPS: &[Step] = &[$($name,)*];
    };
}

steps! {
    /// The source does what is next.
    Source,
    /// The destination does what is next.
    Destination,
    SourceReads,
    DestinationReads,
    /// The destination turns to a new link, whatever it has not read of the old one.
    Accepts,
    /// A side finds its link broken.
    SourceLoses,
    DestinationLoses,
    /// The source makes a new link.
    Connects,
    Cancels,
    Drops,
}

use Step::*;

/// One unit, and two on a frame's way.
fn guest() -> Vec<RegionInfo> {
    vec![region(0, 1)]
}

impl World {
    fn new(budget: Budget) -> Self {
        let (terms, lanes) = (Terms::guest(), Lane::default());
        let source = GuestSourceSession::new(terms, SESSION, lanes, guest()).unwrap();
        let hello = Frame::Hello(source.offer());
        Self {
            source,
            destination: GuestDestinationSession::new(terms, GuestLimits::default()),
            links: (1, 1),
            made: 1,
            to_destination: VecDeque::from([(1, hello)]),
            to_source: VecDeque::new(),
            answers: VecDeque::new(),
            budget,
            ran: false,
            said: 0,
        }
    }

    fn fork(&self) -> Self {
        Self {
            source: self.source.fork(),
            destination: self.destination.fork(),
            to_destination: self.to_destination.clone(),
            to_source: self.to_source.clone(),
            answers: self.answers.clone(),
            ..*self
        }
    }

    fn key(&self) -> String {
        format!(
            "{:?} {:?} {:?} {:?} {:?} {:?} {:?} {} {}",
            self.source,
            self.destination,
            self.links,
            self.to_destination,
            self.to_source,
            self.answers,
            self.budget,
            self.ran,
            self.said,
        )
    }

    fn say(&mut self, frame: Frame) {
        self.source.send(&frame).unwrap_or_else(|error| panic!("{frame:?}: {error}"));
        self.to_destination.push_back((self.links.0, frame));
    }

    fn answer(&mut self, frame: Frame) {
        self.destination.send(&frame).unwrap_or_else(|error| panic!("{frame:?}: {error}"));
        self.to_source.push_back((self.links.1, frame));
    }

    /// Takes the step; `None` if it cannot be taken now.
    fn take(&mut self, step: Step) -> Option<()> {
        match step {
            Source => {
                let frame = self.next_of_source()?;
                match self.source.phase() {
                    Phase::Copying | Phase::Stopping => self.said += 1,
                    Phase::Serving => {
                        self.source.to_send().claim(0, run(0, 1)).unwrap();
                    }
                    _ => {}
                }
                self.say(frame);
            }
            Destination => {
                let frame = self.next_of_destination()?;
                self.ran |= frame == Frame::Running;
                self.answer(frame);
            }
            SourceReads => self.source_reads()?,
            DestinationReads => self.destination_reads()?,
            Accepts => self.accept()?,
            SourceLoses => {
                self.may_break(self.source.phase(), self.left_by_destination())?;
                self.source.lost();
            }
            DestinationLoses => {
                self.may_break(self.destination.phase(), self.left_by_source())?;
                self.destination.lost();
                self.answers.clear();
            }
            Connects => self.connect()?,
            Cancels => {
                let phase = self.source.phase();
                let may =
                    guest_source_sends(Lane::default(), Channel::Control, phase, Kind::Cancel);
                if self.budget.cancels == 0 || may.is_none() || !self.source.may_run() {
                    return None;
                }
                self.budget.cancels -= 1;
                self.say(sample(Kind::Cancel));
            }
            Drops => {
                let phase = self.destination.phase();
                if self.budget.drops == 0 {
                    return None;
                }
                match phase {
                    Phase::Prepared | Phase::Starting => self.answer(Frame::Dropped),
                    // Nobody is there to be told.
                    Phase::Closed if self.destination.standing().is_some() && !self.ran => {
                        self.destination.drop_guest().unwrap();
                    }
                    _ => return None,
                }
                self.budget.drops -= 1;
            }
        }
        Some(())
    }

    /// The source is gone from the destination's link, and all that it said has been read.
    fn left_by_source(&self) -> bool {
        let unread = self.to_destination.iter().any(|(link, _)| *link == self.links.1);
        !unread && (self.source.phase() == Phase::Closed || self.links.0 != self.links.1)
    }

    /// The destination is gone from the source's link, and all that it said has been read.
    fn left_by_destination(&self) -> bool {
        let unread = self.to_source.iter().any(|(link, _)| *link == self.links.0);
        !unread && self.destination.phase() == Phase::Closed && self.links.0 == self.links.1
    }

    /// A link that the other side has left breaks by itself; one that works costs a loss.
    fn may_break(&mut self, phase: Phase, broken: bool) -> Option<()> {
        if phase == Phase::Closed {
            return None;
        }
        if !broken {
            self.budget.losses = self.budget.losses.checked_sub(1)?;
        }
        Some(())
    }

    fn connect(&mut self) -> Option<()> {
        let resumes = self.source.belief().is_some();
        // A source that has the guest may say so to a destination that waits.
        let tells = !resumes && self.source.agreed().is_some() && self.budget.cancels > 0;
        if !(resumes || tells) || self.destination.phase() == Phase::Greeting {
            return None;
        }
        let offer = self.source.reconnect(Lane::default()).ok()?;
        self.budget.cancels -= u8::from(tells);
        self.made += 1;
        self.links.0 = self.made;
        self.to_destination.push_back((self.made, Frame::Hello(offer)));
        Some(())
    }

    /// What the source says from `Accept` to `Switch`: a round and nothing missing, or no round.
    fn script(&self) -> Vec<Frame> {
        if self.budget.round {
            vec![
                Frame::RoundBegin { round: 1, units: 1 },
                Frame::Zero { span: span(0, 0, 1) },
                Frame::RoundEnd { round: 1, units: 1 },
                Frame::StateBegin(state()),
                state_chunk(),
                Frame::Switch { round: 1, missing: 0 },
            ]
        } else {
            vec![
                Frame::StateBegin(state()),
                state_chunk(),
                Frame::Missing { region: 0, runs: vec![run(0, 1)] },
                Frame::Switch { round: 0, missing: 1 },
            ]
        }
    }

    fn next_of_source(&self) -> Option<Frame> {
        Some(match self.source.phase() {
            Phase::Listing => self.source.regions(),
            Phase::Copying | Phase::Stopping => self.script().swap_remove(self.said),
            Phase::Deciding => Frame::Run,
            Phase::Serving if self.source.to_send().total() > 0 => {
                Frame::Zero { span: span(0, 0, 1) }
            }
            Phase::Completed => {
                let ack = Frame::CompleteAck(self.source.counts());
                // It is sent once.
                return self.source.fork().send(&ack).is_ok().then_some(ack);
            }
            Phase::Rejoining => match self.source.belief() {
                Some(belief) => Frame::Resume(belief),
                None => sample(Kind::Cancel),
            },
            _ => return None,
        })
    }

    fn next_of_destination(&mut self) -> Option<Frame> {
        Some(match self.destination.phase() {
            Phase::Allocating => Frame::Accept(vec![AcceptedRegion { id: 0, granule: UNIT }]),
            Phase::Restoring => self.destination.ready()?,
            Phase::Starting => Frame::Running,
            Phase::Running => self.destination.completion()?,
            Phase::Dropping => Frame::Cancelled,
            Phase::Comparing => match self.answers.pop_front() {
                Some(frame) => frame,
                // Started, and not said yet: that is done first.
                None => self.destination.standing().unwrap_or(Frame::Running),
            },
            _ => return None,
        })
    }

    fn source_reads(&mut self) -> Option<()> {
        if self.source.phase() == Phase::Closed {
            return None;
        }
        // What came on an old link is gone with it.
        let at = self.to_source.iter().position(|(link, _)| *link == self.links.0)?;
        let (_, frame) = self.to_source.drain(..=at).next_back()?;
        let before = self.source.may_run();
        let event =
            self.source.receive(&frame).unwrap_or_else(|error| panic!("{error}: {frame:?}"));
        if event == SourceEvent::Dropped {
            assert!(self.source.may_run() && !self.ran);
        }
        assert!(before || !self.source.may_run() || !self.ran, "taken back after it ran");
        Some(())
    }

    /// Somebody connects with the session's id: what was there before is over.
    fn accept(&mut self) -> Option<()> {
        let link = self.links.1;
        let at = self.to_destination.iter().position(|(new, _)| *new > link)?;
        self.to_destination.drain(..at);
        self.links.1 += 1;
        assert_eq!(self.to_destination[0].0, self.links.1, "links are made one after the other");
        self.answers.clear();
        self.destination.lost();
        if self.destination.reconnect().is_err() {
            // There is nothing to go on with: the source is told that nobody knows it.
            self.to_destination.clear();
            self.source.lost();
        }
        Some(())
    }

    fn destination_reads(&mut self) -> Option<()> {
        if self.destination.phase() == Phase::Closed {
            return None;
        }
        let at_hand = self.to_destination.front().filter(|(link, _)| *link == self.links.1);
        at_hand?;
        let (_, frame) = self.to_destination.pop_front()?;
        let event =
            self.destination.receive(&frame).unwrap_or_else(|error| panic!("{error}: {frame:?}"));
        self.destination.settle();
        match event {
            DestinationEvent::Agreed => {
                let answer = Frame::Hello(*self.destination.agreed().unwrap());
                self.to_source.push_back((self.links.1, answer));
            }
            DestinationEvent::RoundDone => {
                let ack = self.destination.round_ack().unwrap();
                self.answer(ack);
            }
            DestinationEvent::Resumed(_) => self.answers = self.destination.have().collect(),
            _ => {}
        }
        Some(())
    }

    /// What must be true whatever happens.
    fn check(&self) {
        let (ours, theirs) = (self.source.may_run(), self.destination.may_run());
        assert!(!(ours && theirs), "two may run: {}", self.key());
        assert!(!(ours && self.ran), "the guest went back in time: {}", self.key());
        // Where neither may, the source has given it away, and does not forget that.
        assert!(ours || self.source.belief().is_some());
    }

    fn one_runs(&self) -> bool {
        self.source.may_run() != self.destination.may_run()
    }

    /// A step that nobody needs: none of these may be what saves the guest.
    fn is_trouble(&self, step: Step) -> bool {
        match step {
            SourceLoses => !self.left_by_destination(),
            DestinationLoses => !self.left_by_source(),
            Cancels | Drops => true,
            _ => false,
        }
    }
}

/// Every state that can be reached: what must be true is, and from each of them, if nothing more
/// goes wrong, exactly one side comes to run the guest. Returns how many there are.
fn explore(budget: Budget) -> usize {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut calm: Vec<Vec<usize>> = Vec::new();
    let mut good: Vec<bool> = Vec::new();
    let mut open = VecDeque::new();
    let mut add = |world: World,
                   open: &mut VecDeque<(usize, World)>,
                   calm: &mut Vec<Vec<usize>>,
                   good: &mut Vec<bool>| {
        let next = seen.len();
        *seen.entry(world.key()).or_insert_with(|| {
            world.check();
            good.push(world.one_runs());
            calm.push(Vec::new());
            open.push_back((next, world));
            next
        })
    };
    add(World::new(budget), &mut open, &mut calm, &mut good);
    while let Some((at, world)) = open.pop_front() {
        for step in STEPS.iter().copied() {
            let trouble = world.is_trouble(step);
            let mut next = world.fork();
            if next.take(step).is_none() {
                continue;
            }
            let to = add(next, &mut open, &mut calm, &mut good);
            if !trouble {
                calm[to].push(at);
            }
        }
    }
    // Backwards from where exactly one runs.
    let mut reached = good.clone();
    let mut back: Vec<usize> = (0..good.len()).filter(|state| good[*state]).collect();
    while let Some(state) = back.pop() {
        for before in std::mem::take(&mut calm[state]) {
            if !std::mem::replace(&mut reached[before], true) {
                back.push(before);
            }
        }
    }
    let stuck = seen.iter().find(|(_, state)| !reached[**state]);
    assert!(stuck.is_none(), "nobody will ever run the guest: {}", stuck.unwrap().0);
    good.len()
}

#[test]
fn no_two_copies_run_and_none_is_lost() {
    for round in [false, true] {
        for (losses, cancels, drops) in
            [(0, 1, 1), (1, 0, 0), (1, 1, 1), (2, 0, 1), (2, 1, 0), (2, 1, 1)]
        {
            let budget = Budget { losses, cancels, drops, round };
            let began = std::time::Instant::now();
            let states = explore(budget);
            println!("{budget:?}: {states} states in {:?}", began.elapsed());
            assert!(states > 10, "{states}");
        }
    }
}
