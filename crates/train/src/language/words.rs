//! The words of the language, in tables by what they do in a sentence.
//!
//! Inflection is regular on purpose: a noun is plural, and a verb in the present singular, exactly
//! when it ends in `s` (or is `is`). That makes the grammar easy to check from the words alone.

/// A noun: singular and plural.
pub(super) type Noun = [&'static str; 2];

/// A masculine noun beside the feminine one.
pub(super) const GENDERED_NOUNS: [[Noun; 2]; 16] = [
    [["king", "kings"], ["queen", "queens"]],
    [["boy", "boys"], ["girl", "girls"]],
    [["father", "fathers"], ["mother", "mothers"]],
    [["brother", "brothers"], ["sister", "sisters"]],
    [["uncle", "uncles"], ["aunt", "aunts"]],
    [["son", "sons"], ["daughter", "daughters"]],
    [["nephew", "nephews"], ["niece", "nieces"]],
    [["monk", "monks"], ["nun", "nuns"]],
    [["wizard", "wizards"], ["witch", "witches"]],
    [["lord", "lords"], ["lady", "ladies"]],
    [["husband", "husbands"], ["wife", "wives"]],
    [
        ["grandfather", "grandfathers"],
        ["grandmother", "grandmothers"],
    ],
    [["knight", "knights"], ["dame", "dames"]],
    [["groom", "grooms"], ["bride", "brides"]],
    [["hero", "heroes"], ["heroine", "heroines"]],
    [["cowboy", "cowboys"], ["cowgirl", "cowgirls"]],
];

/// Nouns that say nothing about gender.
pub(super) const NEUTRAL_NOUNS: [Noun; 24] = [
    ["farmer", "farmers"],
    ["teacher", "teachers"],
    ["doctor", "doctors"],
    ["pilot", "pilots"],
    ["singer", "singers"],
    ["baker", "bakers"],
    ["writer", "writers"],
    ["painter", "painters"],
    ["dancer", "dancers"],
    ["lawyer", "lawyers"],
    ["driver", "drivers"],
    ["sailor", "sailors"],
    ["student", "students"],
    ["guard", "guards"],
    ["judge", "judges"],
    ["clerk", "clerks"],
    ["hunter", "hunters"],
    ["soldier", "soldiers"],
    ["dog", "dogs"],
    ["cat", "cats"],
    ["horse", "horses"],
    ["bird", "birds"],
    ["goat", "goats"],
    ["tiger", "tigers"],
];

/// Verbs without an object: present singular and present plural.
pub(super) const INTRANSITIVE_VERBS: [[&str; 2]; 20] = [
    ["sings", "sing"],
    ["runs", "run"],
    ["sleeps", "sleep"],
    ["laughs", "laugh"],
    ["waits", "wait"],
    ["smiles", "smile"],
    ["works", "work"],
    ["walks", "walk"],
    ["swims", "swim"],
    ["dreams", "dream"],
    ["travels", "travel"],
    ["listens", "listen"],
    ["shouts", "shout"],
    ["rests", "rest"],
    ["jumps", "jump"],
    ["dances", "dance"],
    ["reads", "read"],
    ["cooks", "cook"],
    ["stumbles", "stumble"],
    ["whispers", "whisper"],
];

/// The copula, present singular and plural; an adjective follows it.
pub(super) const COPULA: [&str; 2] = ["is", "are"];

/// Verbs with an object: present singular, present plural, past.
pub(super) const TRANSITIVE_VERBS: [[&str; 3]; 16] = [
    ["chases", "chase", "chased"],
    ["helps", "help", "helped"],
    ["follows", "follow", "followed"],
    ["watches", "watch", "watched"],
    ["admires", "admire", "admired"],
    ["calls", "call", "called"],
    ["visits", "visit", "visited"],
    ["greets", "greet", "greeted"],
    ["thanks", "thank", "thanked"],
    ["praises", "praise", "praised"],
    ["blames", "blame", "blamed"],
    ["trusts", "trust", "trusted"],
    ["fears", "fear", "feared"],
    ["remembers", "remember", "remembered"],
    ["protects", "protect", "protected"],
    ["warns", "warn", "warned"],
];

pub(super) const ADJECTIVES: [&str; 16] = [
    "happy", "tired", "old", "young", "tall", "hungry", "angry", "calm", "brave", "clever",
    "quiet", "rich", "poor", "famous", "honest", "proud",
];

pub(super) const PREPOSITIONS: [&str; 8] = [
    "near", "behind", "beside", "with", "above", "below", "opposite", "before",
];

/// Reflexive pronouns: masculine singular, feminine singular, plural.
pub(super) const REFLEXIVES: [&str; 3] = ["himself", "herself", "themselves"];

pub(super) const NAMES: [&str; 32] = [
    "alice", "bob", "carol", "david", "emma", "frank", "grace", "henry", "iris", "jack", "kate",
    "leo", "mary", "noah", "olga", "paul", "rosa", "simon", "tina", "victor", "wendy", "adam",
    "betty", "carl", "diana", "edgar", "fiona", "george", "helen", "ivan", "julia", "karl",
];

pub(super) const COUNTRIES: [&str; 24] = [
    "alvonia", "brastia", "calmera", "dorvania", "elluria", "fenmark", "gorland", "hestia",
    "ibrania", "jorvia", "kelmar", "lothia", "mirania", "norvald", "ostrana", "pellora", "quorra",
    "rastania", "silvaria", "torvia", "ulmeria", "valdora", "wessia", "zandria",
];

pub(super) const CITIES: [&str; 24] = [
    "tarsk", "mirel", "bodan", "kesh", "lorne", "varda", "pinsk", "oslet", "drim", "haven", "jaro",
    "quint", "selby", "ruska", "temar", "ulva", "nimes", "ferro", "galt", "corin", "ambry",
    "westin", "yalt", "zorin",
];

pub(super) const RIVERS: [&str; 24] = [
    "aldre", "bren", "cauld", "delm", "eska", "firth", "gaune", "hulme", "indra", "jente", "kolv",
    "lune", "marne", "neva", "orla", "pruth", "quell", "rhene", "swale", "trent", "ure", "volka",
    "wye", "yarrow",
];

/// What a country has one of, each with its table of values.
pub(super) const RELATIONS: [(&str, &[&str; 24]); 2] = [("capital", &CITIES), ("river", &RIVERS)];

pub(super) const COLOURS: [&str; 12] = [
    "red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "purple",
    "orange", "golden",
];

pub(super) const OBJECTS: [&str; 14] = [
    "box", "cup", "lamp", "book", "ring", "ball", "coat", "drum", "spoon", "map", "clock", "rope",
    "kite", "stone",
];

pub(super) const PLACES: [&str; 12] = [
    "market", "park", "school", "museum", "station", "beach", "garden", "library", "forest",
    "bridge", "harbour", "tower",
];

/// Opening and closing brackets.
pub(super) const BRACKETS: [[&str; 2]; 3] = [["(", ")"], ["[", "]"], ["{", "}"]];

/// Words that hold sentences together.
pub(super) const FUNCTION_WORDS: [&str; 23] = [
    ".", ",", "the", "that", "of", "in", "from", "to", "and", "when", "then", "so", "unlike",
    "people", "know", "has", "lives", "picks", "went", "gave", "it", "told", "about",
];

/// Every word once, in the order of their identifiers.
pub(super) fn all() -> impl Iterator<Item = &'static str> {
    FUNCTION_WORDS
        .into_iter()
        .chain(COPULA)
        .chain(REFLEXIVES)
        .chain(BRACKETS.into_iter().flatten())
        .chain(GENDERED_NOUNS.into_iter().flatten().flatten())
        .chain(NEUTRAL_NOUNS.into_iter().flatten())
        .chain(INTRANSITIVE_VERBS.into_iter().flatten())
        .chain(TRANSITIVE_VERBS.into_iter().flatten())
        .chain(ADJECTIVES)
        .chain(PREPOSITIONS)
        .chain(NAMES)
        .chain(COUNTRIES)
        .chain(RELATIONS.into_iter().map(|(name, _)| name))
        .chain(CITIES)
        .chain(RIVERS)
        .chain(COLOURS)
        .chain(OBJECTS)
        .chain(PLACES)
}
