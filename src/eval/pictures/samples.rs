//! What is drawn: which wishes, how many pictures of each, and in which order.
//!
//! A picture of a call depends on its wish, the seed and its number alone. Wishes are drawn in turn, so that `fulgur image
//! generate` with the same classes or prompts and seed draws the same pictures again.

use std::collections::{BTreeMap, BTreeSet};

use fulgur_datasets::labelled::{Labelled, Part};
use fulgur_datasets::media::Picture;
use serde::{Deserialize, Serialize};

use super::labellings::Labelling;
use crate::paint::{Painter, Settings, Wish};

/// What steers a picture.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Its class; the text is left open
    Class,
    /// A held-out caption that no training picture has; the class is left open
    Text,
    /// Such a caption with the class of its picture
    Both,
}

impl By {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Class => "class",
            Self::Text => "text",
            Self::Both => "class and text",
        }
    }
}

/// One wish, and how often it is drawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) wish: Wish,
    /// A held-out picture with this caption.
    pub(super) picture: Option<usize>,
    /// Pictures of it where wishes are in the proportions of real pictures.
    pub(super) matched: usize,
}

/// All wishes of a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) by: By,
    pub(super) items: Vec<Item>,
    /// Pictures of each wish that are judged.
    pub(super) equal: usize,
}

impl Plan {
    /// `equal` pictures of each class, and `matched` in the proportions of the training pictures.
    pub(super) fn by_class(set: &Labelled, labelling: &Labelling, equal: usize, matched: usize) -> Self {
        let mut labels: Vec<usize> = (set.part(Part::Train).into_iter())
            .filter_map(|index| labelling.of[index])
            .collect();
        labels.sort_unstable();
        let mut counts = vec![0; labelling.classes.len()];
        if !labels.is_empty() {
            // Evenly through all pictures, ordered by class.
            for number in 0..matched {
                counts[labels[(2 * number + 1) * labels.len() / (2 * matched)]] += 1;
            }
        }
        let item = |(class, matched)| Item {
            wish: Wish {
                class: Some(class),
                prompt: String::new(),
            },
            picture: None,
            matched,
        };
        Self {
            by: By::Class,
            items: counts.into_iter().enumerate().map(item).collect(),
            equal,
        }
    }

    /// `equal` pictures of each caption that held-out pictures have and training pictures have not, with the classes of
    /// `labelling` where there is one, and, where `matched`, one for each of the held-out pictures.
    pub(super) fn by_caption(
        set: &Labelled,
        labelling: Option<&Labelling>,
        equal: usize,
        matched: bool,
    ) -> Self {
        let known: BTreeSet<&str> = (set.part(Part::Train).into_iter())
            .filter_map(|index| set.caption(index))
            .collect();
        let mut places: BTreeMap<&str, usize> = BTreeMap::new();
        let mut items: Vec<Item> = Vec::new();
        for index in set.part(Part::HeldOut) {
            let caption = set.caption(index).unwrap_or_default();
            if caption.is_empty() || known.contains(caption) {
                continue;
            }
            let place = *places.entry(caption).or_insert_with(|| {
                items.push(Item {
                    wish: Wish {
                        class: labelling.and_then(|labelling| labelling.of[index]),
                        prompt: caption.to_owned(),
                    },
                    picture: Some(index),
                    matched: 0,
                });
                items.len() - 1
            });
            items[place].matched += usize::from(matched);
        }
        Self {
            by: match labelling {
                Some(_) => By::Both,
                None => By::Text,
            },
            items,
            equal,
        }
    }

    /// The wish of each picture in the order of drawing: rounds of all wishes, then of those of which more is wanted.
    pub(super) fn order(&self) -> Vec<Place> {
        let count = |item: &Item| self.equal.max(item.matched);
        let rounds = self.items.iter().map(count).max().unwrap_or(0);
        (0..rounds)
            .flat_map(|round| {
                let wanted = self.items.iter().enumerate();
                wanted
                    .filter(move |(_, item)| round < count(item))
                    .map(move |(item, _)| Place { item, round })
            })
            .collect()
    }

    /// Pictures that are drawn of it.
    pub(super) fn count(&self) -> usize {
        let each = self.items.iter().map(|item| self.equal.max(item.matched));
        each.fold(0, usize::saturating_add)
    }
}

/// Which wish a picture is of, and which picture of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) item: usize,
    pub(super) round: usize,
}

/// Pictures of a plan.
#[derive(Debug)]
pub(super) struct Drawn {
    pub(super) plan: Plan,
    pub(super) places: Vec<Place>,
    pub(super) pictures: Vec<Picture>,
    /// Whether there are all of them.
    pub(super) finished: bool,
}

impl Drawn {
    /// Draws a plan, `batch` pictures at a time. `on_step` is called after each step with the pictures done, as a fraction where
    /// they are under way, and ends the work by returning false.
    ///
    /// # Errors
    /// Settings out of range or a failing operation.
    pub(super) fn of(
        plan: Plan,
        painter: &Painter<'_>,
        settings: &Settings,
        batch: usize,
        on_step: &mut dyn FnMut(f64) -> bool,
    ) -> anyhow::Result<Self> {
        let mut places = plan.order();
        let wish = |place: &Place| plan.items[place.item].wish.clone();
        painter.check(
            &places.iter().take(1).map(wish).collect::<Vec<_>>(),
            settings,
            None,
        )?;
        let mut pictures: Vec<Picture> = Vec::with_capacity(places.len());
        for chosen in places.chunks(batch.max(1)) {
            let wishes: Vec<Wish> = chosen.iter().map(wish).collect();
            let first = pictures.len();
            let drawn = painter.group(&wishes, first, settings, None, &mut |step| {
                let part = step.done as f64 / step.total.max(1) as f64;
                on_step(first as f64 + part * wishes.len() as f64)
            })?;
            match drawn {
                Some(drawn) => pictures.extend(drawn),
                None => break,
            }
        }
        let finished = pictures.len() == places.len();
        places.truncate(pictures.len());
        Ok(Self {
            plan,
            places,
            pictures,
            finished,
        })
    }

    /// Numbers of the pictures that are judged: equally many of each wish, as many as there are of all.
    pub(super) fn equal(&self) -> Vec<usize> {
        let rounds = match self.finished {
            true => self.plan.equal,
            false => (self.pictures.len() / self.plan.items.len().max(1)).min(self.plan.equal),
        };
        self.numbers(|place| place.round < rounds)
    }

    /// Numbers of the pictures in the proportions of real ones; none before there are all.
    pub(super) fn matched(&self) -> Vec<usize> {
        self.numbers(|place| self.finished && place.round < self.plan.items[place.item].matched)
    }

    fn numbers(&self, wanted: impl Fn(&Place) -> bool) -> Vec<usize> {
        let places = self.places.iter().enumerate();
        places
            .filter(|(_, place)| wanted(place))
            .map(|(number, _)| number)
            .collect()
    }

    /// The wish of a picture.
    pub(super) fn item(&self, number: usize) -> &Item {
        &self.plan.items[self.places[number].item]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_datasets::labelled::Item as Labelled1;

    /// Pictures of two classes, three of the first to one of the second, with captions that are shared by pairs.
    fn set() -> (Labelled, Labelling) {
        let items: Vec<Labelled1> = (0..400)
            .map(|number| Labelled1 {
                picture: Picture::new(vec![7; 3], 1, 1, 3).unwrap(),
                label: Some(usize::from(number % 4 == 0)),
                caption: Some(format!("thing {}", number / 2)),
                key: format!("{}", number / 2 * 2),
            })
            .collect();
        let classes = vec!["often".to_owned(), "rare".to_owned()];
        let set = Labelled::in_memory("test", classes.clone(), items).unwrap();
        let labelling = Labelling {
            name: "test".to_owned(),
            classes,
            of: (0..set.len()).map(|index| set.label(index)).collect(),
        };
        (set, labelling)
    }

    #[test]
    fn classes_are_drawn_equally_and_in_the_proportions_of_training() {
        let (set, labelling) = set();
        let trained = set.part(Part::Train).len();
        let plan = Plan::by_class(&set, &labelling, 5, trained);
        assert_eq!(
            plan.items.iter().map(|item| item.matched).collect::<Vec<_>>(),
            set.counts(Part::Train)
        );
        let plan = Plan::by_class(&set, &labelling, 5, 20);
        let matched: Vec<usize> = plan.items.iter().map(|item| item.matched).collect();
        assert_eq!(matched.iter().sum::<usize>(), 20);
        assert!((14..=16).contains(&matched[0]), "{matched:?}");
        assert_eq!(plan.count(), matched[0] + 5.max(matched[1]));
        let order = plan.order();
        assert_eq!(order.len(), plan.count());
        // Five rounds of both, so that the program draws them again with both classes in turn.
        let turns: Vec<usize> = order.iter().take(10).map(|place| place.item).collect();
        assert_eq!(turns, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]);
        let drawn = |done: usize| Drawn {
            places: order[..done].to_vec(),
            pictures: vec![Picture::new(vec![0; 3], 1, 1, 3).unwrap(); done],
            finished: done == order.len(),
            plan: plan.clone(),
        };
        let all = drawn(order.len());
        let of = |numbers: &[usize], class: usize| {
            numbers
                .iter()
                .filter(|&&number| all.places[number].item == class)
                .count()
        };
        assert_eq!((of(&all.equal(), 0), of(&all.equal(), 1)), (5, 5));
        assert_eq!(
            (of(&all.matched(), 0), of(&all.matched(), 1)),
            (matched[0], matched[1])
        );
        // Of seven pictures three rounds are whole.
        assert_eq!(drawn(7).equal(), [0, 1, 2, 3, 4, 5]);
        assert!(drawn(7).matched().is_empty() && drawn(1).equal().is_empty());
    }

    #[test]
    fn captions_are_those_that_training_never_saw() {
        let (set, labelling) = set();
        let held_out = set.part(Part::HeldOut);
        let plan = Plan::by_caption(&set, Some(&labelling), 2, true);
        // Pairs share their key, so that both are held out.
        assert_eq!((plan.by, 2 * plan.items.len()), (By::Both, held_out.len()));
        for item in &plan.items {
            let index = item.picture.unwrap();
            assert!(held_out.contains(&index));
            assert_eq!(item.matched, 2);
            assert_eq!(item.wish.class, set.label(index));
            assert_eq!(Some(item.wish.prompt.as_str()), set.caption(index));
        }
        let plain = Plan::by_caption(&set, None, 2, false);
        assert_eq!(plain.by, By::Text);
        assert!(
            plain
                .items
                .iter()
                .all(|item| item.wish.class.is_none() && item.matched == 0)
        );
        assert_eq!(plain.count(), 2 * plain.items.len());
    }
}
