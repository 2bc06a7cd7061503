"""Words that fill the templates of `other_topics`; none names a shape or a color of the scenes."""

NOUNS = """
dog cat horse cow pig sheep goat rabbit mouse rat fox wolf bear lion tiger elephant giraffe zebra monkey gorilla panda
kangaroo koala deer moose camel donkey squirrel hedgehog beaver otter badger hamster whale dolphin shark seal penguin
owl eagle hawk parrot pigeon swan duck goose chicken rooster turkey peacock crow sparrow flamingo ostrich frog toad
lizard snake turtle crocodile dinosaur dragon spider ant bee butterfly beetle mosquito snail crab lobster
octopus jellyfish salmon goldfish apple banana pear peach cherry grape lemon melon pineapple mango strawberry
blueberry coconut tomato potato carrot onion cucumber pumpkin mushroom pepper broccoli cabbage bread cake cookie pizza
sandwich burger pancake waffle donut cheese egg sausage steak soup salad noodle rice chocolate candy coffee tea bottle
cup glass mug plate bowl fork knife spoon pan kettle oven fridge table chair sofa bed pillow blanket lamp candle mirror
clock watch phone computer laptop keyboard screen camera television radio speaker microphone headphone printer robot
drone car bus truck van taxi bicycle motorcycle scooter train tram subway airplane helicopter rocket spaceship boat
ship submarine canoe tractor ambulance house castle tower bridge church temple museum library school hospital hotel
factory barn tent cabin lighthouse windmill stadium airport garden park street road tunnel fountain statue tree flower
rose tulip sunflower daisy cactus leaf bush forest mountain hill volcano river lake ocean beach island desert waterfall
cave cloud rainbow sun moon planet comet galaxy snowman snowflake storm lightning fire campfire shirt jacket coat dress
skirt sweater hat cap scarf glove shoe boot sock belt tie umbrella backpack suitcase wallet necklace crown pencil pen
book newspaper letter map ruler brush painting guitar piano violin drum trumpet flute saxophone harp football
basketball skateboard surfboard kite balloon puzzle doll teddy toy ladder hammer screwdriver wrench saw nail rope
chain key lock door window wall roof fence chimney mailbox anchor barrel basket bucket broom bell flag trophy medal
coin banknote wheel engine battery telescope microscope magnet pirate knight king queen princess wizard
witch ghost zombie vampire mermaid fairy angel clown astronaut doctor nurse teacher farmer fireman policeman soldier
sailor dancer singer painter chef baby boy girl woman man face hand eye foot tooth skeleton
""".split()

ADJECTIVES = """
small big tiny huge old new young happy sad angry sleepy hungry beautiful ugly shiny dirty clean wet dry hot cold fast
slow tall short fat thin strong weak brave funny scary cute fluffy wooden metal plastic golden broken ancient modern
famous lonely quiet loud magic wild tame rich poor sweet striped dotted
""".split()

PLACES = """
France Germany Italy Spain Portugal Greece Egypt Morocco Kenya Nigeria Ghana Ethiopia Tanzania India Pakistan Nepal
China Japan Korea Vietnam Thailand Malaysia Indonesia Australia Canada Mexico Cuba Jamaica Brazil Argentina Chile Peru
Bolivia Colombia Ecuador Uruguay Poland Hungary Austria Switzerland Belgium Netherlands Denmark Norway Sweden Finland
Iceland Ireland Scotland England Wales Russia Ukraine Romania Bulgaria Croatia Serbia Slovenia Estonia Latvia Israel
Jordan Iran Iraq Mongolia Madagascar Paris London Berlin Rome Madrid Lisbon Athens Istanbul Cairo Nairobi Delhi Mumbai
Beijing Shanghai Tokyo Kyoto Seoul Bangkok Singapore Sydney Melbourne Toronto Montreal Chicago Boston Seattle Denver
Dallas Houston Miami Lima Bogota Santiago Vienna Prague Warsaw Budapest Zurich Geneva Brussels Amsterdam Copenhagen Oslo
Stockholm Helsinki Dublin Edinburgh Moscow Texas California Florida Alaska Hawaii
""".split()

VERBS = """
buy sell build repair wash paint cook bake boil fry cut fold open close unlock start stop move lift carry push pull
throw catch hide find lose break fix bend burn freeze melt grow plant water feed ride drive steer fly land sail row
climb jump kick hit hold wear sew knit iron pack wrap send receive return rent borrow lend steal share copy print scan
install update remove replace connect charge test measure weigh count sort store keep collect sharpen decorate design
draw sketch photograph film record play sing teach learn study describe explain compare rate review name choose pick
order cancel check protect rescue
""".split()

SCENERY = (
    "mountain lake", "city street", "sunny beach", "snowy forest", "busy market", "foggy harbor", "quiet village",
    "crowded train station", "night sky", "flower meadow", "old castle on a hill", "river in autumn", "rainy window",
    "sunset over the sea", "field of wheat", "desert with camels", "kitchen with a cook", "living room",
    "football game", "birthday party", "wedding", "family dinner", "rock concert", "classroom", "office desk",
    "space station", "coral reef", "tropical island", "frozen lake", "misty valley", "farm with animals",
    "skyline at night", "garden full of roses", "boat on the water", "child with a kite", "woman with an umbrella",
    "man reading a book", "cat on a sofa", "dog in the snow", "bird on a branch", "horse in a field", "plate of pasta",
    "cup of coffee", "bowl of fruit", "stack of books", "pair of shoes", "vintage car", "steam train",
    "hot air balloon", "glass of wine",
)  # fmt: skip

THEMES = """
love friendship autumn winter spring summer rain snow wind time money happiness sadness freedom peace war history
science music art dance sport travel work family childhood dreams sleep food health medicine nature animals space stars
robots computers internet poetry philosophy religion politics democracy justice economics mathematics physics chemistry
biology astronomy geography psychology climate energy electricity gravity evolution tennis chess cooking gardening
fishing photography cinema theater opera jazz fashion architecture language writing reading marriage loneliness courage
honesty
""".split()

PEOPLE = (
    "Albert Einstein", "Isaac Newton", "Marie Curie", "Charles Darwin", "Galileo", "Leonardo da Vinci", "Michelangelo",
    "Vincent van Gogh", "Pablo Picasso", "Claude Monet", "Frida Kahlo", "Shakespeare", "Goethe", "Jane Austen",
    "Mark Twain", "Tolstoy", "Dostoevsky", "Homer", "Plato", "Aristotle", "Socrates", "Confucius", "Napoleon",
    "Julius Caesar", "Cleopatra", "Alexander the Great", "Genghis Khan", "Columbus", "Marco Polo", "Abraham Lincoln",
    "George Washington", "Nelson Mandela", "Gandhi", "Mozart", "Beethoven", "Bach", "Chopin", "Elvis Presley",
    "the Beatles", "Madonna", "Michael Jackson", "Neil Armstrong", "Alan Turing", "Ada Lovelace", "Nikola Tesla",
    "Thomas Edison", "Bill Gates", "Pele", "Muhammad Ali", "Charlie Chaplin",
)  # fmt: skip

LANGUAGES = """
French German Italian Spanish Portuguese Greek Turkish Arabic Hebrew Hindi Urdu Chinese Japanese Korean Vietnamese Thai
Russian Ukrainian Polish Czech Hungarian Romanian Dutch Danish Norwegian Swedish Finnish Icelandic Irish Latin Swahili
Persian Bengali Tamil Malay
""".split()

PROGRAMMING_LANGUAGES = "Python Java JavaScript C Rust Go Ruby PHP Perl Haskell Kotlin Swift Fortran SQL Bash".split()

PROGRAMS = (
    "sorts a list", "reverses a string", "reads a file", "adds two numbers", "finds prime numbers",
    "prints hello world", "counts words", "computes a factorial", "removes duplicates", "parses JSON",
    "downloads a page", "sends an email", "checks a password", "merges two lists", "finds the largest number",
    "draws a chart", "plays a sound", "renames files", "converts units", "rolls dice",
)  # fmt: skip

PHRASES = (
    "good morning", "good night", "thank you", "see you tomorrow", "I am hungry", "where is the station", "I love you",
    "how are you", "happy birthday", "the weather is nice", "my name is Anna", "what time is it", "I do not understand",
    "please help me", "the bill, please", "welcome home", "I am lost", "have a nice trip", "two tickets, please",
    "see you soon",
)  # fmt: skip

OTHER_COLORS = """
purple orange pink brown gray violet turquoise cyan magenta beige gold silver bronze maroon navy teal olive lime indigo
lavender crimson scarlet coral ivory cream khaki mint copper amber
""".split()

OTHER_SHAPES = """
hexagon pentagon octagon heptagon star heart oval ellipse rectangle diamond rhombus trapezoid parallelogram polygon cube
sphere cylinder cone pyramid prism crescent arrow spiral line zigzag wave semicircle cuboid torus helix
""".split()

OTHER_NUMBERS = """
five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty
thirty forty fifty sixty
""".split()
