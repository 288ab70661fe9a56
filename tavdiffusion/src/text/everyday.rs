//! Everyday words of prompts: things, sounds, motions, places. Each table is one string, entries split at `, `.

/// The entries of a table.
pub(super) fn entries(table: &'static str) -> Vec<&'static str> {
    table.split(", ").collect()
}

/// How or when something sounds.
pub(super) const MANNERS: &str = "\
    loudly, softly, twice, once, again and again, for a moment, suddenly, in the distance, happily, angrily, \
    slowly, quickly, at the end, at the beginning, in the middle, halfway through";

/// Where something is.
pub(super) const PLACES: &str = "\
    on the left, on the right, in the center, in the middle, in a field, in the kitchen, on a farm, in the \
    forest, on the street, in the sky, on the grass, at night, by the sea, on a stage, in the snow, under a \
    tree, in a room, at home";

/// What something looks like.
pub(super) const QUALITIES: &str = "\
    small, little, big, large, huge, tiny, young, old, loud, noisy, quiet, wild, angry, happy, sleepy, cute, \
    hungry, scary, white, black, brown, grey, red, green, blue, yellow, golden, colorful, shiny, wooden, \
    metal, broken, new, fast, slow, fluffy";

/// Verbs of motion.
pub(super) const MOVES: &str = "\
    fall, drop, jump, hop, bounce, slide, glide, fly, run, walk, roll, land, appear, show up, leap, come, \
    enter, move, rush, sail, swim, drive, tumble, stand, sit, arrive";

/// Ways and ends of a motion.
pub(super) const WAYS: &str = "\
    from the left, from the right, from above, from the top, to the left, to the right, on the left, on the \
    right, in the middle, up and down, across the screen, into view, to the ground, from the sky, from the \
    left side, from the right side, in the center, out of nowhere, on the left side";

/// Verbs of sound.
pub(super) const SOUNDS: &str = "\
    bark, woof, yap, howl, growl, snarl, whine, yelp, meow, mew, purr, hiss, moo, low, bellow, bleat, baa, \
    oink, grunt, snort, squeal, neigh, whinny, nicker, bray, hee-haw, roar, trumpet, chatter, shriek, \
    screech, scream, hoot, caw, croak, ribbit, quack, honk, cluck, crow, cackle, gobble, coo, cuckoo, chirp, \
    tweet, twitter, sing, warble, trill, whistle, squawk, cry, call, peep, cheep, buzz, hum, drone, click, \
    squeak, gnaw, munch, crunch, chew, ring, chime, toll, clang, clank, clink, jingle, tinkle, ding, dong, \
    tick, beep, ping, bleep, toot, blare, wail, rumble, rattle, clatter, thunder, crash, bang, boom, \
    explode, pop, crackle, fizz, sizzle, boil, bubble, splash, drip, gurgle, pour, flush, hammer, knock, \
    pound, tap, thump, thud, slam, creak, snap, snip, saw, scrape, scratch, grind, whir, whoosh, swish, \
    rustle, flutter, flap, play, strum, drum, twang, sound, make a noise, make music, speak, talk, laugh, \
    giggle, clap, cheer, snore, sneeze, cough, moan, groan, sigh, whisper, shout, yell, chug, rev, vroom, \
    puff, blow";

/// Things that are seen or heard, in the singular.
pub(super) const NOUNS: &str = "\
    dog, puppy, hound, doggy, mutt, poodle, terrier, sheepdog, cat, kitten, kitty, tomcat, fox, wolf, bear, \
    cub, lion, lioness, tiger, big cat, panther, elephant, hippo, hippopotamus, rhino, giraffe, zebra, \
    horse, pony, stallion, mare, foal, donkey, mule, ass, cow, cattle, calf, bull, ox, buffalo, bison, goat, \
    billy goat, kid, sheep, ewe, lamb, ram, pig, piglet, hog, sow, boar, deer, doe, stag, moose, elk, \
    reindeer, caribou, camel, llama, monkey, ape, chimp, chimpanzee, gorilla, koala, kangaroo, wombat, \
    badger, ferret, weasel, beaver, squirrel, chipmunk, rabbit, bunny, hare, mouse, rat, hamster, rodent, \
    bat, seal, sea lion, walrus, dolphin, porpoise, whale, orca, killer whale, shark, fish, frog, toad, \
    bullfrog, lizard, iguana, snake, rattlesnake, turtle, crocodile, dinosaur, bird, songbird, blackbird, \
    lark, robin, sparrow, nightingale, crow, raven, magpie, parrot, toucan, macaw, owl, hawk, eagle, falcon, \
    vulture, seagull, gull, pelican, heron, stork, penguin, duck, duckling, mallard, drake, goose, gander, \
    swan, hen, chicken, chick, rooster, cock, cockerel, turkey, pigeon, dove, cuckoo, peacock, ostrich, emu, \
    rhea, insect, bug, bee, bumblebee, wasp, hornet, fly, mosquito, cricket, grasshopper, cicada, moth, \
    butterfly, spider, ghost, phantom, monster, witch, robot, baby, child, man, woman, crowd, violin, \
    fiddle, cello, double bass, guitar, electric guitar, banjo, ukulele, lute, harp, piano, keyboard, organ, \
    accordion, harmonica, flute, recorder, clarinet, oboe, bassoon, saxophone, sax, trumpet, trombone, tuba, \
    horn, french horn, bugle, bagpipe, didgeridoo, drum, drum kit, snare, bongo, conga, tambourine, cymbal, \
    gong, triangle, xylophone, marimba, bell, church bell, doorbell, alarm clock, clock, watch, timer, \
    phone, telephone, camera, radio, television, computer, typewriter, printer, kettle, teapot, bottle, \
    glass, cup, frying pan, toaster, blender, washing machine, vacuum cleaner, hoover, hair dryer, toilet, \
    faucet, tap, shower, door, gate, window, hammer, mallet, saw, chainsaw, drill, nail, shovel, axe, whip, \
    balloon, ball, whistle, rubber duck, toy, firework, rocket, bomb, gun, cannon, lightning, thunder, \
    storm, rain, wind, sea, ocean, wave, river, waterfall, fire, campfire, volcano, car, automobile, race \
    car, truck, lorry, bus, taxi, fire engine, fire truck, ambulance, police car, siren, motorcycle, \
    motorbike, scooter, bicycle, bike, train, locomotive, steam engine, tram, subway, ship, boat, ferry, \
    submarine, plane, airplane, jet, helicopter, spaceship, lander, tractor, tank, excavator, bulldozer, \
    crane, apple, carrot, popcorn, soup, egg, leaf, tree, branch, paper, book, coin, key, zipper, chain, \
    rope, umbrella, shoe, flag, football, tennis racket, bowling ball, swing, seesaw, wheel, engine, motor, \
    machine, fan";

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn entries_are_clean_and_occur_once() {
        for table in [MANNERS, PLACES, QUALITIES, MOVES, WAYS, SOUNDS, NOUNS] {
            let entries = entries(table);
            assert!(entries.len() > 10);
            assert_eq!(entries.iter().collect::<HashSet<_>>().len(), entries.len());
            for entry in entries {
                let clean = !entry.is_empty() && entry.trim() == entry && !entry.contains([',', '\n']);
                assert!(clean && !entry.contains("  "), "{entry:?}");
            }
        }
    }
}
