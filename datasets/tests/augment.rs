//! Chance in training: the same bits always, the right distributions, refused settings.

use fulgur_datasets::augment::{Augment, Batch, Erasing, Fill, RandAugment, RandomCrop, Sample, View};
use fulgur_datasets::labelled::{Item, Labelled};
use fulgur_datasets::media::Picture;

/// A picture whose red is the column and whose green is the row.
fn gradient(width: usize, height: usize, blue: u8) -> Picture {
    let pixels = (0..height).flat_map(|y| (0..width).flat_map(move |x| [x as u8, y as u8, blue]));
    Picture::new(pixels.collect(), width, height, 3).unwrap()
}

fn set(pictures: Vec<Picture>) -> Labelled {
    let classes = (0..pictures.len()).map(|n| n.to_string()).collect();
    let items = pictures.into_iter().enumerate().map(|(n, picture)| Item {
        picture,
        label: Some(n),
        caption: None,
        key: n.to_string(),
    });
    Labelled::in_memory("test", classes, items.collect()).unwrap()
}

/// Bytes as they are.
fn bytes(side: usize) -> View {
    View {
        height: side,
        width: side,
        crop: 1.0,
        mean: [0.0; 3],
        std: [1.0 / 255.0; 3],
        ..View::default()
    }
}

fn everything() -> Augment {
    Augment {
        crop: Some(RandomCrop::default()),
        pad: 2,
        flip: 0.5,
        randaugment: Some(RandAugment::default()),
        erasing: Some(Erasing {
            probability: 0.5,
            ..Erasing::default()
        }),
        mixup: 0.8,
        cutmix: 1.0,
    }
}

fn samples(count: usize, pictures: usize, first: u64) -> Vec<Sample> {
    (0..count)
        .map(|n| Sample {
            picture: (n + first as usize) % pictures,
            number: first + n as u64,
        })
        .collect()
}

#[test]
fn batches_have_the_same_bits_for_any_threads_and_any_cut() {
    let set = set((0..6).map(|n| gradient(30 + n, 25, n as u8)).collect());
    let view = View {
        height: 16,
        width: 24,
        ..View::default()
    };
    let make = |threads: usize, samples: &[Sample]| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| everything().batch(&view, &set, samples, 9).unwrap())
    };
    let all = samples(12, 6, 100);
    let whole = make(1, &all);
    assert_eq!(whole.shape, [12, 3, 16, 24]);
    assert_eq!(whole, make(5, &all));
    let (first, second) = (make(2, &all[..4]), make(3, &all[4..]));
    assert_eq!(whole.pixels, [first.pixels, second.pixels].concat());
    assert_eq!(whole.targets, [first.targets, second.targets].concat());
    assert_ne!(
        whole.pixels,
        everything().batch(&view, &set, &all, 10).unwrap().pixels
    );
    let later = samples(12, 6, 112);
    assert_ne!(whole.pixels, make(1, &later).pixels);
    assert!(whole.pixels.iter().all(|value| value.is_finite()));
}

#[test]
fn evaluation_is_normalised_and_grey_is_luminance() {
    let set = set(vec![gradient(8, 8, 200), gradient(8, 8, 0)]);
    let view = View {
        mean: View::IMAGENET_MEAN,
        std: View::IMAGENET_STD,
        ..bytes(8)
    };
    let batch = view.batch(&set, &[1, 0]).unwrap();
    let at = |n: usize, y: usize, x: usize, c: usize| batch.pixels[((n * 3 + c) * 8 + y) * 8 + x];
    assert!((at(1, 3, 5, 0) - (5.0 / 255.0 - 0.485) / 0.229).abs() < 1e-6);
    assert!((at(1, 3, 5, 1) - (3.0 / 255.0 - 0.456) / 0.224).abs() < 1e-6);
    assert!((at(1, 3, 5, 2) - (200.0 / 255.0 - 0.406) / 0.225).abs() < 1e-6);
    assert_eq!((batch.targets[0].class, batch.targets[1].class), (1, 0));
    let grey = View {
        channels: 1,
        ..bytes(8)
    }
    .batch(&set, &[0])
    .unwrap();
    assert_eq!(grey.shape, [1, 1, 8, 8]);
    let expected = (0.299 * 5.0 + 0.587 * 3.0 + 0.114 * 200.0f32).round();
    assert!((grey.pixels[3 * 8 + 5] - expected).abs() < 1e-3);
}

/// The part of a gradient that a crop took: left, top, width and height, from its corner values. The sides are exact to a pixel or two.
fn taken(batch: &Batch, n: usize) -> [f32; 4] {
    let [_, channels, height, width] = batch.shape;
    let at = |y: usize, x: usize, c: usize| batch.pixels[((n * channels + c) * height + y) * width + x];
    let step = |from: f32, to: f32, count: usize| (to - from) / (count - 1) as f32 * count as f32;
    let w = step(at(5, 8, 0), at(5, width - 9, 0), width - 16) * width as f32 / (width - 16) as f32;
    let h = step(at(8, 5, 1), at(height - 9, 5, 1), height - 16) * height as f32 / (height - 16) as f32;
    [at(0, 0, 0), at(0, 0, 1), w, h]
}

#[test]
fn random_crops_have_the_areas_and_ratios_that_are_asked_for() {
    let set = set(vec![gradient(250, 250, 0)]);
    let view = bytes(64);
    let crop = RandomCrop {
        area: [0.2, 0.8],
        ..RandomCrop::default()
    };
    let augment = Augment {
        crop: Some(crop),
        ..Augment::default()
    };
    let batch = augment.batch(&view, &set, &samples(600, 1, 0), 3).unwrap();
    let parts: Vec<[f32; 4]> = (0..600).map(|n| taken(&batch, n)).collect();
    let areas: Vec<f32> = parts.iter().map(|[_, _, w, h]| w * h / 62_500.0).collect();
    let ratios: Vec<f32> = parts.iter().map(|[_, _, w, h]| (w / h).ln()).collect();
    let mean = |values: &[f32]| values.iter().sum::<f32>() / values.len() as f32;
    assert!(areas.iter().all(|area| (0.17..0.84).contains(area)), "{areas:?}");
    assert!((mean(&areas) - 0.5).abs() < 0.03, "{}", mean(&areas));
    let small = areas.iter().filter(|&&area| area < 0.35).count();
    assert!((120..190).contains(&small), "a quarter of them: {small}");
    assert!(mean(&ratios).abs() < 0.03, "{}", mean(&ratios));
    assert!(
        ratios
            .iter()
            .all(|ratio| ratio.abs() < (4.0f32 / 3.0).ln() + 0.05)
    );
    let wide = ratios
        .iter()
        .filter(|ratio| ratio.abs() > 0.5 * (4.0f32 / 3.0).ln())
        .count();
    assert!((250..350).contains(&wide), "half of them: {wide}");
}

#[test]
fn crops_of_any_picture_work() {
    let shapes = [(1, 1), (1, 200), (200, 1), (2, 3)];
    let set = set(shapes.map(|(w, h)| gradient(w, h, 7)).to_vec());
    let samples = samples(64, 4, 0);
    for area in [[0.08, 1.0], [1.0, 1.0]] {
        let augment = Augment {
            crop: Some(RandomCrop {
                area,
                ..RandomCrop::default()
            }),
            ..everything()
        };
        let batch = augment.batch(&bytes(5), &set, &samples, 1).unwrap();
        assert!(batch.pixels.iter().all(|value| value.is_finite()));
    }
    everything().batch(&bytes(1), &set, &samples, 1).unwrap();
}

#[test]
fn flips_and_shifts_move_whole_pictures() {
    let set = set(vec![gradient(8, 8, 50)]);
    let view = bytes(8);
    let augment = Augment {
        flip: 0.25,
        ..Augment::default()
    };
    let batch = augment.batch(&view, &set, &samples(2000, 1, 0), 3).unwrap();
    let firsts = batch
        .pixels
        .chunks_exact(8 * 8 * 3)
        .map(|values| (values[0], values[7]));
    let mut flipped = 0;
    for pair in firsts {
        assert!([(0.0, 7.0), (7.0, 0.0)].contains(&pair), "{pair:?}");
        flipped += usize::from(pair == (7.0, 0.0));
    }
    assert!((430..570).contains(&flipped), "{flipped}");

    let augment = Augment {
        pad: 2,
        ..Augment::default()
    };
    let batch = augment.batch(&view, &set, &samples(2000, 1, 0), 3).unwrap();
    let mut seen = [[0; 5]; 5];
    for values in batch.pixels.chunks_exact(8 * 8 * 3) {
        // The middle is never black.
        let middle = |plane: usize| values[(plane * 8 + 4) * 8 + 4] as usize;
        let (x, y) = (middle(0) - 2, middle(1) - 2);
        seen[y][x] += 1;
        let black = values[2 * 64..].iter().filter(|&&value| value == 0.0).count();
        assert_eq!(black, 64 - (8 - x.abs_diff(2)) * (8 - y.abs_diff(2)));
    }
    assert!(
        seen.as_flattened().iter().all(|count| (45..120).contains(count)),
        "{seen:?}"
    );
}

#[test]
fn mixup_and_cutmix_give_the_classes_their_shares() {
    let plain = |value| Picture::new(vec![value; 20 * 30 * 3], 20, 30, 3).unwrap();
    let set = set(vec![plain(0), plain(255)]);
    let view = View {
        height: 30,
        width: 20,
        ..bytes(8)
    };
    for (mixup, cutmix) in [(0.8, 0.0), (0.0, 1.0), (0.2, 1.0)] {
        let augment = Augment {
            mixup,
            cutmix,
            ..Augment::default()
        };
        let samples = samples(201, 2, 0);
        let batch = augment.batch(&view, &set, &samples, 5).unwrap();
        let soft = batch.soft_targets(2, 0.1);
        let mut weights = Vec::new();
        for (n, values) in batch.pixels.chunks_exact(30 * 20 * 3).enumerate() {
            let white = values.iter().sum::<f32>() / (255.0 * values.len() as f32);
            let target = batch.targets[n];
            let share = if target.class == 1 {
                target.weight
            } else {
                1.0 - target.weight
            };
            let share = if n == 200 { 0.0 } else { share };
            assert!((white - share).abs() < 1e-4, "{n}: {white} {target:?}");
            assert!((soft[2 * n + 1] - (0.05 + 0.9 * share)).abs() < 1e-4);
            assert!((soft[2 * n] + soft[2 * n + 1] - 1.0).abs() < 1e-5);
            weights.push(target.weight);
        }
        assert_eq!(weights[200], 1.0, "the last of an odd batch stays itself");
        let distinct = weights
            .iter()
            .map(|weight| weight.to_bits())
            .collect::<std::collections::HashSet<_>>();
        assert!(distinct.len() > 50, "{mixup} {cutmix}: {}", distinct.len());
    }
}

#[test]
fn erased_rectangles_have_their_areas() {
    let set = set(vec![Picture::new(vec![255; 40 * 40 * 3], 40, 40, 3).unwrap()]);
    let erasing = Erasing {
        probability: 0.5,
        area: [0.1, 0.3],
        ratio: [0.5, 2.0],
        fill: Fill::Mean,
    };
    let augment = Augment {
        erasing: Some(erasing),
        ..Augment::default()
    };
    let batch = augment.batch(&bytes(40), &set, &samples(1000, 1, 0), 2).unwrap();
    let (mut erased, mut sum) = (0, 0.0);
    for values in batch.pixels.chunks_exact(40 * 40 * 3) {
        let gone = values.iter().filter(|&&value| value == 0.0).count() as f32 / values.len() as f32;
        if gone > 0.0 {
            assert!((0.09..0.32).contains(&gone), "{gone}");
            erased += 1;
            sum += gone;
        }
    }
    assert!((440..560).contains(&erased), "{erased}");
    assert!(
        (sum / erased as f32 - 0.2).abs() < 0.015,
        "{}",
        sum / erased as f32
    );
    let noisy = Augment {
        erasing: Some(Erasing {
            probability: 1.0,
            fill: Fill::Noise,
            ..erasing
        }),
        ..Augment::default()
    };
    let batch = noisy.batch(&bytes(40), &set, &samples(50, 1, 0), 2).unwrap();
    let noise: Vec<f32> = batch
        .pixels
        .iter()
        .copied()
        .filter(|&value| value < 200.0)
        .collect();
    let mean = noise.iter().sum::<f32>() / noise.len() as f32;
    let square = noise.iter().map(|x| x * x).sum::<f32>() / noise.len() as f32;
    assert!(
        noise.len() > 10_000 && mean.abs() < 0.03 && (square - 1.0).abs() < 0.05,
        "{mean} {square}"
    );
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let parse = |text: &str| serde_json::from_str::<Augment>(text);
    assert_eq!(parse("{}").unwrap(), Augment::default());
    for text in [
        "{\"flop\": 1}",
        "{\"crop\": {\"size\": 1}}",
        "{\"erasing\": {\"fill\": \"red\"}}",
    ] {
        assert!(parse(text).is_err(), "{text}");
    }
    let nan = f64::NAN;
    let erasing = |probability, area| {
        Some(Erasing {
            probability,
            area,
            ..Erasing::default()
        })
    };
    let crop = |area, ratio| Some(RandomCrop { area, ratio });
    let off = Augment::default;
    for (augment, message) in [
        (Augment { flip: nan, ..off() }, "flip: found NaN, expected 0 to 1"),
        (Augment { flip: 1.5, ..off() }, "flip: found 1.5, expected 0 to 1"),
        (
            Augment { mixup: -1.0, ..off() },
            "mixup: found -1, expected 0 to 100",
        ),
        (
            Augment {
                cutmix: f64::INFINITY,
                ..off()
            },
            "cutmix: found inf",
        ),
        (
            Augment { pad: 5000, ..off() },
            "pad: found 5000, expected 0 to 4096",
        ),
        (
            Augment {
                crop: crop([0.5, 0.2], [1.0, 1.0]),
                ..off()
            },
            "crop.area: found [0.5, 0.2]",
        ),
        (
            Augment {
                crop: crop([0.0, 0.2], [1.0, 1.0]),
                ..off()
            },
            "crop.area: found 0, expected 0.001 to 1",
        ),
        (
            Augment {
                crop: crop([0.1, 0.2], [1.0, nan]),
                ..off()
            },
            "crop.ratio: found NaN",
        ),
        (
            Augment {
                erasing: erasing(nan, [0.1, 0.2]),
                ..off()
            },
            "erasing.probability: found NaN",
        ),
        (
            Augment {
                erasing: erasing(0.1, [0.1, 1.2]),
                ..off()
            },
            "erasing.area: found 1.2",
        ),
        (
            Augment {
                randaugment: Some(RandAugment {
                    magnitude: 11.0,
                    ..RandAugment::default()
                }),
                ..off()
            },
            "randaugment.magnitude: found 11, expected 0 to 10",
        ),
        (
            Augment {
                randaugment: Some(RandAugment {
                    operations: Vec::new(),
                    ..RandAugment::default()
                }),
                ..off()
            },
            "randaugment.operations: found none",
        ),
    ] {
        let text = augment.check().unwrap_err().to_string();
        assert!(text.starts_with(message), "{text}");
        let set = set(vec![gradient(4, 4, 0)]);
        assert!(augment.batch(&bytes(4), &set, &[], 0).is_err());
    }
    for (view, message) in [
        (
            View {
                height: 0,
                ..View::default()
            },
            "height: found 0",
        ),
        (
            View {
                channels: 2,
                ..View::default()
            },
            "channels: found 2, expected 1 or 3",
        ),
        (
            View {
                crop: 0.0,
                ..View::default()
            },
            "crop: found 0",
        ),
        (
            View {
                std: [1.0, 0.0, 1.0],
                ..View::default()
            },
            "std: found 0",
        ),
        (
            View {
                mean: [nan; 3],
                ..View::default()
            },
            "mean: found NaN",
        ),
    ] {
        let text = view.check().unwrap_err().to_string();
        assert!(text.starts_with(message), "{text}");
    }
}
