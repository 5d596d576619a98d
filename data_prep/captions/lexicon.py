"""Closed word lists for the caption rules.

All lists are ours. The module contains words only, no logic; the longest list is in a text file
next to it. Words are chosen for their meaning, never to make the sentence of a test pass.
"""

import pathlib


def word_set(text: str) -> frozenset[str]:
    """Splits a text at whitespace into a set of words."""
    return frozenset(text.split())


# Function words. They distinguish English from other languages, and are never objects in a
# picture.
FUNCTION_WORDS = word_set("""
    a about above after against all along an and any are around as at away back be because been
    before behind being below between but by can could did do does down during each every few for
    from front get had has have he her here him his how i if in inside into is it its just like
    made make many me more most my near new next no not now of off on one or other our out outside
    over own s she should so some such than that the their them then there these they this those
    three through to together too top two under until up us very was we were what when where which
    while who will with without would you your
""")

# Nouns for the picture itself. Before "of" they stand for what the picture shows.
PICTURE_NOUNS = word_set("""
    animation artwork background capture cartoon clip clipart close-up closeup concept
    depiction detail doodle drawing engraving footage frame graphic icon illustration image
    infographic landscape lapse macro painting panorama photo photograph photography pic picture
    portrait print profile render rendering scene screenshot selfie series shot silhouette sketch
    snap snapshot stock timelapse vector video view wallpaper watercolor watercolour
""")

# Nouns, numerals and determiners that count. Before "of" they stand for what they count. A herd or
# a collection is an object and does not belong here.
COUNTING_WORDS = word_set("""
    all both bunch couple dozen dozens each few group hundred hundreds kind kinds lot lots
    majority many million millions most much none number one pair pairs plenty row rows several
    some sort sorts thousand thousands three trio two
""")

# Nouns inside compound prepositions: "in front of", "in the middle of". The bare ones count only
# without an article: "on top of", but not "at the top of the tower".
PLACE_NOUNS = word_set("back center centre front middle midst top")
BARE_PLACE_NOUNS = word_set("back top")
PLACE_PREPOSITIONS = word_set("""
    above across against along among around at before behind below beneath beside between by in
    inside near next on opposite outside over through under underneath
""")

# Prepositions that connect clauses or comparisons rather than objects.
NO_RELATION = word_set("""
    according because concerning considering despite due except excluding per regarding
    versus vs vs.
""")

# Adjectives that form one predicate with their preposition: "full of", "close to".
RELATIONAL_ADJECTIVES = word_set("adjacent close full next opposite similar")

# Words tagged as adjectives that count, order or point instead of describing.
NO_ATTRIBUTES = word_set("""
    about all another any certain double each eighth enough entire every few fewer fifth
    first former fourth further half individual last latter least less many more most much
    multiple next ninth numerous other overall own past previous same second seventh several
    sixth such tenth third total triple twice various whole
""")

# Nouns that act as adjectives of the noun after them.
DESCRIBING_NOUNS = word_set("""
    antique beige black blue bronze brown crimson cyan gold gray green grey indigo ivory khaki
    lavender luxury magenta maroon navy orange pink premium purple red retro silver tan teal
    turquoise vintage violet white yellow
""")

# Adjectives that the dictionary also lists as nouns. Before a noun they are attributes.
ADJECTIVES = word_set("""
    african american arabian arctic asian australian austrian automatic belgian bohemian
    brazilian bridal british canadian celtic chinese christian classic contemporary cuban
    custom danish decorative derelict digital domestic dutch egyptian elastic electric english
    european exotic finnish floral french funny german gothic gourmet greek hawaiian historic
    hungarian hybrid indian indie indonesian inflatable international irish islamic italian
    japanese jewish korean local manual marine matte metallic mexican military miniature modern
    moroccan muslim national native natural newlywed nordic norwegian olympic organic oriental
    ornamental persian peruvian plastic polish portable portuguese professional romanian
    russian rustic sacred scandinavian scottish spanish suburban swedish swiss synthetic tender
    thai tibetan tropical turkish ukrainian urban vegan vegetarian vertical victorian
    vietnamese welsh
""")

# Nouns that the tagger reads as adjectives. They name a kind: "pet dog", "attic window".
KIND_NOUNS = word_set("""
    arch attic ballet calico chicken christmas coral locomotive mosaic net pedal pet premiere
    rooftop sign tabby teen terminal thanksgiving
""")

# Words in -ed and -ing that form one attribute with the word before them: "green eyed".
JOINED_PARTICIPLES = word_set("""
    aged bodied colored coloured eyed faced feeling footed haired handed headed heeled legged
    looking necked rimmed shaped sized sleeved smelling tailed tasting winged
""")

# Color words. They are attributes of a noun after them, else objects: "isolated on white".
COLORS = DESCRIBING_NOUNS - word_set("antique luxury premium retro vintage")

# Adjectives whose infinitive counts as an action: "about to land".
IMMINENT_ADJECTIVES = word_set("about able ready")

# Nouns without content.
VAGUE_NOUNS = word_set("""
    aka anyone anything etc everything indoor indoors none nothing one ones outdoor outdoors
    something
""")

# Nouns whose purpose a preceding -ing form names: "dining area", "sewing machine".
PURPOSE_NOUNS = word_set("""
    area arena bag block board boat book boot business car card center centre class club company
    competition court day device dress equipment event festival field game gear ground guard guide
    gym hall idea instruction kit lane lesson line machine magazine match material page paper park
    party path place pole pool product race rack range ring rink rod room school season service
    set ship shoe sign site space stadium station stick studio suit system table team tip tool
    tour track trail trip truck van vehicle website
""")

# -ing forms that name the purpose of the noun after them: "living room". Those of ROOM_GERUNDS do
# so at the start of a caption too, where others are actions: "cutting cakes".
ROOM_GERUNDS = word_set("dining filming living parking reviewing sitting swimming waiting")
PURPOSE_GERUNDS = ROOM_GERUNDS | word_set("""
    baking bathing bidding blending bowling breeding building camping carving charging chewing
    cleaning cooking cutting cycling dining diving dressing drinking drying filling filming
    fishing frying gaming gardening greeting grooming hiking hunting ironing jogging knitting
    landing living loading mating meeting mining mixing nursing operating packing parking
    performing polling pouring reading reclining recording reviewing roasting rocking rowing
    sailing sanding seating serving sewing shaving shipping shopping sitting skating skiing
    snorkeling soldering steering storing studying sunbathing surfing swimming tanning trading
    training voting waiting washing wedding welding wrapping wrestling writing
""")

# Color words that name a kind before these nouns: "orange juice", but not "an orange flower".
FRUIT_PARTS = {
    "lavender": word_set("bush field flower garden oil plant"),
    "olive": word_set("branch grove oil tree"),
    "orange": word_set("grove juice marmalade peel segment slice soda sorbet wedge zest"),
}

# Nouns that the parser reads as verbs when they start a caption and have no object.
FIRST_NOUNS = word_set("""
    copy cover design dish dress face journey leak model pattern plan produce project ring seating
    shadow sign stand talk view visit work
""")

# Objects that are part of the verb rather than things: "take place".
LIGHT_OBJECTS = {"take": word_set("advantage care part place")}

# -ing forms that are nouns (things and occupations), even after a living thing.
NOMINAL_GERUNDS = word_set("""
    breeding building carving ceiling clothing crossing drawing ending engraving evening fishing
    greeting grooming housing hunting landing lighting listing marking meeting morning offering
    opening painting parking racing setting showing training watching wedding writing
""")

# Plurals that are read as verbs but form one name with these words before them: "autumn leaves".
NAMED_PLURALS = {
    "drops": word_set("blood dew rain water"),
    "falls": word_set("water"),
    "forces": word_set("air army police security"),
    "leaves": word_set("autumn banana bay fall lotus maple mint oak palm tea tree"),
    "mates": word_set("class house room school team"),
}

# Objects of "have" before an activity: "having fun playing".
PASTIMES = word_set("difficulty fun time trouble")

# Times, weather and backgrounds: the setting of everything else in the caption.
SETTINGS = word_set("""
    afternoon autumn backdrop background dawn day daylight daytime dusk evening format midnight
    moonlight morning motion night nightfall noon spring summer sun sunlight sunrise sunset
    sunshine twilight weather winter
""")

# Nouns for time or manner; a relative clause after them describes what happens then or how.
MANNERS = word_set("moment place reason time way")

# Calendar words. They count as objects only after a preposition.
CALENDAR = word_set("""
    april august century decade december february friday hour january july june monday month
    november october saturday september sunday thursday today tomorrow tonight tuesday wednesday
    week year yesterday
""")

PERSON_PRONOUNS = word_set("""
    anybody anyone everybody everyone he her him i me she somebody someone them they us we you
""")
SUBJECT_PRONOUNS = word_set("he i she they we")
RELATIVE_PRONOUNS = word_set("who whom which that")

# Nouns for living things, and first names that are not also other words. They act: in "girl with a
# hat smiling", the girl smiles.
ANIMATE_NOUNS = word_set(pathlib.Path(__file__).with_name("animate_nouns.txt").read_text("utf-8"))

# Suffixes of nouns for persons, and nouns with such a suffix that are not persons.
ANIMATE_ENDINGS = ("caster", "eer", "ician", "ist", "man", "minister", "woman")
THINGS_LIKE_PERSONS = word_set("""
    beer career caster checklist cist fist gist list mist ottoman peer pier playlist sheer
    shortlist talisman twist veneer waist whist wishlist wrist
""")

# Verbs that things can do as well as persons: in "girl with hair blowing", the hair blows.
THING_VERBS = word_set("""
    bloom blow burn dangle drip fall flap float flow flutter fly glow grow hang rise shine sparkle
    stand stick stretch swirl wave
""")

# Intransitive verbs. Before a bare noun their -ing form is an attribute ("sleeping cats").
INTRANSITIVE_VERBS = word_set("""
    bark bloom crawl cry dance fall float flow fly gallop glow grin grow hover jump kneel laugh
    leap lie melt rise set shine sit sleep smile sparkle stand stroll swim twinkle walk weep
""")

# Verbs of posture and motion that take any thing as subject: "a square resting on a circle".
POSTURE_VERBS = word_set("""
    bounce drift drop fall float fly hide hover lean lie rest roll sit slide spin stand swing
    tumble
""")

# Everyday actions. After a living thing their forms are verbs, even if the parser reads nouns:
# "dog chases cat", "kids ride bikes".
DEEDS = word_set("""
    bake bark bite blow braid brush build carry catch chase chew climb collect cook crawl cross cut
    dance deliver dig dive drag draw drink drive eat embrace explore feed fight fix float fly gather
    give graze greet grin guard hide hike hit hold hop howl hug hunt inspect jog juggle jump kick
    kiss knit laugh lead lick lift load march milk mow nibble open paint pedal perch pet pick plant
    play plow point pose pour pull push race rake read repair ride roar roll row run sail scatter
    serve sew sing sip sit skate ski skip sleep smell smile sniff spray stand stare steal stir
    stretch surf sweep swim swing teach throw toss touch visit walk wash watch water wave wear weave
    wipe wrestle write yawn
""")

# Verbs of rest. They take an adjective as "be" does: "machines sitting broken in the hall".
RESTING_VERBS = word_set("hang lean lie sit stand")

# Verbs of motion and light. For a subject with an article that is a thing, their -s form before a
# preposition is a verb: "the boat sails on the lake".
MOVING_VERBS = word_set("""
    approach arrive blow bloom burn climb crash cruise depart drift erupt explode float flow fly
    glide glow hang hover land lean lie melt race rise sail shine sink sit soar speed spin stand
""")

# Verbs of state. They relate two objects without an action. Ours: wearing is an action.
STATE_VERBS = word_set("""
    adjoin await be become believe belong boast border comprise concern consist contain cost
    depend deserve doubt equal exist expect feel forget hate have hope include involve know lack
    like live love matter mean need overlook own possess prefer realise realize relate remain
    remember represent require resemble see seem signify span suggest suppose surround symbolise
    symbolize tend think understand want wish
""")

# Verbs of showing. They describe the picture if passive, or if the picture is the subject.
SHOWING_VERBS = word_set("""
    capture demonstrate depict display feature illustrate indicate photograph picture portray
    present see show spot view
""")

# Verbs of making pictures: "photo taken by", "portrait painted by".
PICTURE_MAKING_VERBS = word_set("""
    capture create design draw edit generate illustrate make paint photograph post print produce
    publish render shoot sketch snap take
""")

# Participles of place and kind. In the passive, only their preposition becomes a relation.
PLACING_VERBS = word_set("""
    accommodate arrange base centre center enclose house isolate locate lodge nestle place
    position set situate stage
""")

# Verbs of naming. In the passive, they are neither an action nor a relation.
NAMING_VERBS = word_set("call dub entitle name nickname title")

# Verbs of condition. In the passive without a living agent, they are relations.
CONDITION_VERBS = word_set("""
    accent adorn associate attach coat compose connect consider cover crowd decorate dedicate
    deem describe dress equip fill finish fringe furnish garnish highlight inspire know line
    litter load make overlay pack relate shape strew stuff surround top trim use
""")

# Verbs that pass their subject on to the next verb and are not actions themselves.
PHASE_VERBS = word_set("""
    appear attempt begin continue decide get go have hope keep like love manage need plan prefer
    seem start stop tend try use want
""")

# Verbs whose object is the subject of the next verb: "watch a man ride".
CONTROL_VERBS = word_set("""
    allow ask catch cause challenge commission convince enable encourage feel find force get
    have hear help hire invite keep leave let make order persuade remind see send show spot
    teach tell want watch
""")

# Verbs that link an adjective to their subject, as "be" does.
LINKING_VERBS = word_set("""
    appear become feel get keep look remain seem smell sound stay taste turn
""")
