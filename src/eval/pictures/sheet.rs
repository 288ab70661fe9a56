//! Sheets for the eye: what was drawn, and drawn pictures beside their nearest training pictures.

use fulgur_datasets::draw::{Area, Canvas, Colour, GLYPH, GREY, WHITE, grid as below};
use fulgur_datasets::labelled::Labelled;
use fulgur_datasets::media::Picture;
use serde::Serialize;

use super::neighbours::SHOWN;
use super::samples::{By, Drawn};
use crate::paint::grid;

/// Rows and columns of a block of pictures.
const SIDE: usize = 10;
/// Least side of a picture on the sheet of neighbours.
const LEAST: usize = 64;
const GAP: usize = 4;
const WIDE_GAP: usize = 16;
const LINE: usize = GLYPH + 4;
const DARK: Colour = [18, 18, 22];

/// A picture of a grid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// From the top, beginning with 0.
    pub row: usize,
    /// From the left.
    pub column: usize,
    /// What steered it.
    pub by: By,
    /// Its class, where it has one.
    pub label: Option<String>,
    /// What it shall show, where that is said.
    pub prompt: Option<String>,
    /// Its number among those drawn.
    pub number: usize,
}

/// A drawn picture with its nearest training pictures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What steered it.
    pub by: By,
    /// Its number among those drawn.
    pub number: usize,
    /// Its class, where it has one.
    pub label: Option<String>,
    /// What it shall show, where that is said.
    pub prompt: Option<String>,
    /// By features of the first judge, the nearest first.
    pub features: Vec<Neighbour>,
    /// By pixels.
    pub pixels: Vec<Neighbour>,
}

/// A training picture.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Neighbour {
    /// What the set calls it.
    pub key: String,
    /// What it shows, where somebody said.
    pub caption: Option<String>,
    /// How far away it is.
    pub distance: f64,
    /// Its place among the pictures that are searched.
    #[serde(skip)]
    pub(super) place: usize,
}

impl Neighbour {
    pub(super) fn of(set: &Labelled, index: usize, place: usize, distance: f64) -> Self {
        Self {
            key: set.key(index).to_owned(),
            caption: set.caption(index).map(str::to_owned),
            distance,
            place,
        }
    }
}

/// The class and the prompt of a picture.
pub(super) fn wish(drawn: &Drawn, number: usize, labels: &[String]) -> (Option<String>, Option<String>) {
    let wish = &drawn.item(number).wish;
    let label = wish.class.and_then(|class| labels.get(class)).cloned();
    let prompt = Some(wish.prompt.clone()).filter(|prompt| !prompt.is_empty());
    (label, prompt)
}

/// Up to 10 x 10 pictures of each kind, one block below the other: by class, or in the order of captions, evenly chosen from all
/// that are judged.
///
/// # Errors
/// Nothing was drawn.
pub(super) fn samples(all: &[Drawn], labels: &[String]) -> anyhow::Result<(Picture, Vec<Cell>)> {
    let (mut pictures, mut cells) = (Vec::new(), Vec::new());
    for drawn in all {
        let mut numbers = drawn.equal();
        numbers.sort_by_key(|&number| drawn.places[number].item);
        let count = numbers.len().min(SIDE * SIDE);
        for place in 0..count {
            let number = numbers[place * numbers.len() / count];
            let at = pictures.len();
            let (label, prompt) = wish(drawn, number, labels);
            cells.push(Cell {
                row: at / SIDE,
                column: at % SIDE,
                by: drawn.plan.by,
                label,
                prompt,
                number,
            });
            pictures.push(drawn.pictures[number].clone());
        }
        // The next block begins a row.
        while let Some(last) = pictures.last()
            && !pictures.len().is_multiple_of(SIDE)
        {
            let white = Picture {
                pixels: vec![255; last.pixels.len()],
                ..*last
            };
            pictures.push(white);
        }
    }
    Ok((grid(&pictures, SIDE)?, cells))
}

/// Rows of a drawn picture, its nearest training pictures by features and by pixels, and their distances. `own` is the drawn
/// picture of a row, `training` the picture of a place; all have one size.
pub(super) fn neighbours(
    rows: &[Row],
    own: &dyn Fn(&Row) -> anyhow::Result<Picture>,
    training: &dyn Fn(usize) -> anyhow::Result<Picture>,
) -> anyhow::Result<Picture> {
    let panels: Vec<Canvas> = rows
        .iter()
        .map(|row| panel(row, &own(row)?, training))
        .collect::<anyhow::Result<_>>()?;
    Ok(below(&panels, 2).into_picture())
}

fn panel(
    row: &Row,
    own: &Picture,
    training: &dyn Fn(usize) -> anyhow::Result<Picture>,
) -> anyhow::Result<Canvas> {
    let times = LEAST.div_ceil(own.width.max(own.height).max(1)).max(1);
    let (width, height) = (own.width * times, own.height * times);
    let step = width.max(LEAST) + GAP;
    let wide = (1 + 2 * SHOWN) * step + 2 * WIDE_GAP;
    let mut canvas = Canvas::new(wide, height + 2 * LINE + GAP, DARK);
    let mut draw = |left: usize, picture: &Picture, words: &str| {
        let area = Area {
            x: left as i32,
            y: LINE as i32,
            width,
            height,
        };
        canvas.blit(area, &picture.pixels, picture.width, picture.height);
        canvas.text(left as i32, (LINE + height + 2) as i32, words, GREY, 1);
    };
    draw(0, own, "drawn");
    let mut left = step + WIDE_GAP;
    for near in [&row.features, &row.pixels] {
        for (slot, neighbour) in near.iter().take(SHOWN).enumerate() {
            let words = format!("{:.3}", neighbour.distance);
            draw(left + slot * step, &training(neighbour.place)?, &words);
        }
        left += SHOWN * step + WIDE_GAP;
    }
    let said = row.prompt.as_ref().or(row.label.as_ref());
    let title = format!(
        "{} {}: {} | by features | by pixels",
        row.by.name(),
        row.number,
        said.map_or("", String::as_str)
    );
    canvas.paragraph(2, 2, &title, WHITE, wide / GLYPH, 1);
    Ok(canvas)
}

#[cfg(test)]
mod tests {
    use super::super::samples::{Item, Plan};
    use super::*;
    use crate::paint::Wish;

    fn plain(level: u8) -> Picture {
        Picture::new(vec![level; 8 * 8 * 3], 8, 8, 3).unwrap()
    }

    fn drawn(by: By, classes: usize, equal: usize) -> Drawn {
        let items = (0..classes)
            .map(|class| Item {
                wish: Wish {
                    class: (by == By::Class).then_some(class),
                    prompt: match by {
                        By::Class => String::new(),
                        _ => format!("thing {class}"),
                    },
                },
                picture: None,
                matched: 0,
            })
            .collect();
        let plan = Plan { by, items, equal };
        let places = plan.order();
        Drawn {
            pictures: places.iter().map(|place| plain(place.item as u8)).collect(),
            places,
            plan,
            finished: true,
        }
    }

    #[test]
    fn a_grid_goes_through_the_classes_and_has_a_block_a_kind() {
        let labels: Vec<String> = (0..99).map(|class| format!("class {class}")).collect();
        let (picture, cells) = samples(&[drawn(By::Class, 99, 10), drawn(By::Text, 3, 1)], &labels).unwrap();
        assert_eq!((picture.width, picture.height), (10 * 10 - 2, 11 * 10 - 2));
        assert_eq!(cells.len(), 103);
        let pixel = |row: usize, column: usize| picture.pixels[3 * (10 * row * picture.width + 10 * column)];
        let mut seen = vec![0; 99];
        for (at, cell) in cells.iter().take(100).enumerate() {
            assert_eq!((cell.row, cell.column), (at / 10, at % 10));
            let class = usize::from(pixel(cell.row, cell.column));
            assert_eq!(cell.label, Some(labels[class].clone()));
            seen[class] += 1;
        }
        assert!(seen.iter().all(|&count| (1..=2).contains(&count)), "{seen:?}");
        assert_eq!(
            (cells[101].row, cells[101].prompt.as_deref(), &cells[101].label),
            (10, Some("thing 1"), &None)
        );
        assert_eq!((pixel(10, 1), pixel(10, 3)), (1, 255));
        // Ten classes fill a row each.
        let (_, cells) = samples(&[drawn(By::Class, 10, 12)], &labels).unwrap();
        assert!(
            cells
                .iter()
                .all(|cell| cell.label == Some(labels[cell.row].clone()))
        );
        assert!(samples(&[], &labels).is_err());
    }

    #[test]
    fn neighbours_stand_beside_what_was_drawn() {
        let near = |place: usize| Neighbour {
            key: place.to_string(),
            caption: None,
            distance: 0.125,
            place,
        };
        let row = Row {
            by: By::Class,
            number: 3,
            label: Some("bell".to_owned()),
            prompt: None,
            features: vec![near(10), near(20), near(30)],
            pixels: vec![near(40), near(50)],
        };
        let sheet = neighbours(&[row], &|_| Ok(plain(200)), &|place| Ok(plain(place as u8))).unwrap();
        let step = LEAST + GAP;
        assert_eq!(sheet.height, 64 + 2 * LINE + GAP);
        let level = |left: usize| sheet.pixels[3 * ((LINE + 30) * sheet.width + left + 30)];
        assert_eq!(level(0), 200);
        let features = step + WIDE_GAP;
        assert_eq!([0, 1, 2].map(|slot| level(features + slot * step)), [10, 20, 30]);
        let pixels = features + SHOWN * step + WIDE_GAP;
        assert_eq!([0, 1].map(|slot| level(pixels + slot * step)), [40, 50]);
    }
}
