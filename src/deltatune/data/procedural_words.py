"""Words of the procedural tasks; `procedural.py` says how they are read."""

from __future__ import annotations

from collections.abc import Mapping

# Lists that `<` or a sort refers to stand in order. A word's forms stand between bars.
WORDS: Mapping[str, str] = {
    "person": "Ada, Ben, Clara, David, Emma, Felix, Grace, Hugo, Iris, Jonas, Karim, Lena, Milan, Nora, Oscar, Petra",
    "woman": "Ada, Clara, Emma, Grace, Iris, Lena, Nora, Petra, Rosa, Sofia",
    "man": "Ben, David, Felix, Hugo, Jonas, Karim, Milan, Oscar, Tom, Victor",
    "surname": "Adler, Brown, Costa, Duval, Evans, Fischer, Garcia, Hansen, Ivanov, Jones, Kim, Lopez, Moreau, Novak",
    "city": (
        "Accra, Berlin, Cairo, Delhi, Dublin, Lima, Lisbon, Madrid, New York, Oslo, Prague, San Jose, Sydney, Tokyo"
    ),
    "month": "January, February, March, April, May, June, July, August, September, October, November, December",
    "weekday": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "year": "1821, 1848, 1866, 1890, 1903, 1914, 1926, 1939, 1951, 1968, 1977, 1985, 1992, 2004, 2016, 2023",
    "hour": "six, seven, eight, nine, ten, eleven, twelve",
    "number": "two, three, four, five, six, seven, eight, nine, ten, eleven, twelve",
    "day": "3, 5, 8, 11, 14, 17, 19, 22, 26, 28, 30",
    "event": (
        "the concert, the exam, the wedding, the fair, the meeting, the match, the picnic, the auction, the party, the "
        "lecture, the parade, the trial"
    ),
    "room": "attic, cellar, garden, hall, kitchen, office",
    "place": (
        "at the market, in the park, by the river, near the station, behind the school, in the library, on the hill, "
        "across the street, at the harbour, in the old town"
    ),
    "time": "yesterday, last night, this morning, on Sunday, two days ago, last week, in the evening, after lunch",
    "opener": (
        "Honestly, I have to say, To be fair, All in all, As far as I can tell, In short, My verdict, Frankly, In my "
        "view, After two visits"
    ),
    # Categories, each with its article; the second form is the plural.
    "fruit": (
        "an apple|apples, a banana|bananas, a cherry|cherries, a lemon|lemons, a mango|mangoes, a peach|peaches, a "
        "pear|pears, a plum|plums, a fig|figs, a melon|melons"
    ),
    "animal": (
        "a cat|cats, a cow|cows, a dog|dogs, a goat|goats, a horse|horses, a mouse|mice, a sheep|sheep, a "
        "rabbit|rabbits, a goose|geese, a fox|foxes"
    ),
    "tool": (
        "a hammer|hammers, a saw|saws, a drill|drills, a wrench|wrenches, a chisel|chisels, a file|files, an axe|axes, "
        "a screwdriver|screwdrivers, a clamp|clamps, a spade|spades"
    ),
    "garment": (
        "a coat|coats, a scarf|scarves, a hat|hats, a shirt|shirts, a skirt|skirts, a glove|gloves, a belt|belts, a "
        "sock|socks, a jacket|jackets, a tie|ties"
    ),
    "vehicle": (
        "a bus|buses, a car|cars, a van|vans, a tram|trams, a lorry|lorries, a bicycle|bicycles, a boat|boats, a "
        "taxi|taxis, a train|trains, a scooter|scooters"
    ),
    "instrument": (
        "a flute|flutes, a violin|violins, a drum|drums, a harp|harps, a guitar|guitars, a trumpet|trumpets, a "
        "piano|pianos, a cello|cellos, an oboe|oboes, a banjo|banjos"
    ),
    "object": (
        "a box|boxes, a candle|candles, a mirror|mirrors, a bottle|bottles, a letter|letters, a clock|clocks, a "
        "pillow|pillows, a key|keys, a coin|coins, a rope|ropes, a vase|vases, a lamp|lamps"
    ),
    "noun": (
        "anchor|anchors, basket|baskets, candle|candles, dragon|dragons, engine|engines, forest|forests, "
        "garden|gardens, hammer|hammers, island|islands, jacket|jackets, kettle|kettles, ladder|ladders, "
        "mirror|mirrors, needle|needles, orchid|orchids, pencil|pencils, rocket|rockets, saddle|saddles, "
        "tunnel|tunnels, violin|violins"
    ),
    "odd_noun": (
        "child|children, man|men, woman|women, foot|feet, tooth|teeth, goose|geese, mouse|mice, leaf|leaves, "
        "knife|knives, wolf|wolves, city|cities, baby|babies, box|boxes, church|churches, hero|heroes, key|keys"
    ),
    "colour": "red, green, blue, yellow, black, white, purple, orange, grey, pink",
    # base, past, third person, -ing, participle
    "verb": (
        "clean|cleaned|cleans|cleaning|cleaned, paint|painted|paints|painting|painted, "
        "repair|repaired|repairs|repairing|repaired, open|opened|opens|opening|opened, "
        "visit|visited|visits|visiting|visited, watch|watched|watches|watching|watched, "
        "carry|carried|carries|carrying|carried, push|pushed|pushes|pushing|pushed, "
        "follow|followed|follows|following|followed, measure|measured|measures|measuring|measured"
    ),
    "odd_verb": (
        "break|broke|breaks|breaking|broken, choose|chose|chooses|choosing|chosen, draw|drew|draws|drawing|drawn, "
        "find|found|finds|finding|found, hide|hid|hides|hiding|hidden, steal|stole|steals|stealing|stolen, "
        "see|saw|sees|seeing|seen, sell|sold|sells|selling|sold, take|took|takes|taking|taken, "
        "write|wrote|writes|writing|written"
    ),
    "social": (
        "help|helped|helps|helping|helped, visit|visited|visits|visiting|visited, "
        "follow|followed|follows|following|followed, thank|thanked|thanks|thanking|thanked, "
        "greet|greeted|greets|greeting|greeted, teach|taught|teaches|teaching|taught, "
        "forgive|forgave|forgives|forgiving|forgiven, meet|met|meets|meeting|met, call|called|calls|calling|called"
    ),
    "other": (
        "the clerk, the clerks, the child, the children, the dog, the dogs, the neighbour, the neighbours, the judge, "
        "the judges, the sailor, the sailors"
    ),
    "thing": (
        "the fence, the bridge, the house, the window, the museum, the boat, the picture, the table, the gate, the "
        "wall, the statue, the tower"
    ),
    "gift": (
        "the book, the ring, the ticket, the map, the camera, the letter, the cake, the watch, the lamp, the guitar"
    ),
    "news": "the secret, the story, the truth, the address, the result, the plan, the joke, the rumour, the recipe",
    "subject": (
        "doctor|doctors, teacher|teachers, pilot|pilots, farmer|farmers, singer|singers, lawyer|lawyers, baker|bakers, "
        "painter|painters, nurse|nurses, student|students, driver|drivers, guard|guards"
    ),
    "act": (
        "sleeps|sleep, laughs|laugh, waits|wait, sings|sing, arrives|arrive, smiles|smile, works|work, runs|run, "
        "leaves|leave, cooks|cook"
    ),
    "doing": "sings, laughs, cooks, reads, swims, dances, paints, climbs, writes, knits",
    "kind_of": (
        "dog|animal, cat|animal, horse|animal, apple|fruit, pear|fruit, plum|fruit, rose|flower, tulip|flower, "
        "oak|tree, birch|tree, hammer|tool, saw|tool, coat|garment, scarf|garment, violin|instrument, flute|instrument"
    ),
    "synonym": (
        "big|large, fast|quick, happy|glad, ill|sick, angry|cross, quiet|silent, tiny|small, clever|smart, "
        "rich|wealthy, brave|bold, odd|strange, tired|weary, calm|peaceful, famous|well-known"
    ),
    # What reviews are about.
    "food_aspect": (
        "the soup, the pasta, the bread, the fish, the dessert, the coffee, the salad, the curry, the pizza, the "
        "cheese, the rice, the sauce"
    ),
    "food_good": "delicious, tasty, fresh, well seasoned, crisp, superb, full of flavour, lovely",
    "food_bad": "stale, bland, burnt, soggy, greasy, tasteless, cold, inedible",
    "film_aspect": (
        "the plot, the acting, the ending, the script, the soundtrack, the dialogue, the lead, the camera work, the "
        "pacing, the finale, the opening scene, the villain"
    ),
    "film_good": "gripping, moving, clever, brilliant, original, charming, convincing, stunning",
    "film_bad": "dull, predictable, wooden, clumsy, tedious, silly, confused, lifeless",
    "hotel_aspect": (
        "the room, the bed, the shower, the lobby, the breakfast, the staff, the view, the pool, the service, the "
        "balcony, the carpet, the location"
    ),
    "hotel_good": "spotless, comfortable, welcoming, spacious, quiet, excellent, bright, charming",
    "hotel_bad": "filthy, noisy, shabby, cramped, rude, smelly, damp, disappointing",
    "phone_aspect": (
        "the screen, the battery, the camera, the speaker, the keyboard, the charger, the case, the software, the "
        "signal, the microphone, the display, the touch pad"
    ),
    "phone_good": "sharp, reliable, responsive, sturdy, impressive, smooth, long-lasting, handy",
    "phone_bad": "faulty, sluggish, flimsy, blurry, useless, broken, unreliable, weak",
    "book_aspect": (
        "the story, the prose, the first chapter, the hero, the translation, the cover, the twist, the style, the last "
        "page, the setting, the narrator, the humour"
    ),
    "book_good": "captivating, elegant, witty, touching, vivid, inventive, rich, delightful",
    "book_bad": "boring, shallow, long-winded, messy, implausible, flat, pretentious, forgettable",
    "course_aspect": (
        "the lecturer, the homework, the exam, the textbook, the first week, the feedback, the pace, the material, the "
        "seminar, the project, the tutor, the grading"
    ),
    "course_good": "inspiring, clear, fair, helpful, engaging, well organised, rewarding, practical",
    "course_bad": "confusing, unfair, chaotic, useless, outdated, monotonous, careless, disorganised",
    # Topics.
    "physics": (
        "gravity, momentum, the electron, friction, the laser, voltage, the magnet, velocity, heat, the pendulum"
    ),
    "biology": (
        "the cell, evolution, the enzyme, photosynthesis, the gene, the virus, the heart, the nerve, the root, moss"
    ),
    "chemistry": (
        "the acid, the catalyst, the polymer, the solvent, oxygen, the isotope, salt, the alloy, iron, the crystal"
    ),
    "astronomy": (
        "the comet, the telescope, the galaxy, the orbit, the eclipse, Saturn, the nebula, the star, Mars, the moon"
    ),
    "sport": (
        "the striker, the penalty, the referee, the league, the sprint, the trainer, the medal, the racket, the goal, "
        "the marathon"
    ),
    "finance": (
        "the shares, the interest rate, the loan, the profit, the bank, inflation, the bond, the dividend, the "
        "currency, the tax"
    ),
    "politics": (
        "the minister, the election, parliament, the treaty, the vote, the senator, the reform, the campaign, the "
        "coalition, the embassy"
    ),
    "weather": (
        "the storm, the snow, the heat wave, fog, the forecast, the drizzle, the frost, the thunder, the breeze, hail"
    ),
    "carpentry": (
        "the plank, the hinge, the dowel, the varnish, the joint, sawdust, the bench, plywood, the nail, sanding"
    ),
    "sewing": (
        "the thread, the needle, the seam, the zip, the hem, the button, velvet, the lining, the pattern, the thimble"
    ),
    "gardening": (
        "the compost, the seedling, the hedge, the lawn, weeds, the greenhouse, the shovel, the bulb, mulch, pruning"
    ),
    "baking": (
        "the dough, the oven, yeast, the icing, flour, the crust, the whisk, the sponge, vanilla, the rolling pin"
    ),
    # What is compared or named.
    "car": (
        "the van, the truck, the bus, the tram, the coupe, the jeep, the taxi, the scooter, the tractor, the train"
    ),
    "good": (
        "the chair, the lamp, the desk, the sofa, the carpet, the mirror, the clock, the shelf, the vase, the radio"
    ),
    "stone": (
        "the statue, the barrel, the crate, the anvil, the trunk, the boulder, the sack, the stove, the safe, the piano"
    ),
    "town": "Accra, Berlin, Cairo, Delhi, Dublin, Lima, Lisbon, Madrid, Oslo, Prague, Sydney, Tokyo",
    "peak": (
        "the north tower, the chapel, the mill, the old bridge, the castle, the lighthouse, the town hall, the abbey"
    ),
    "amount": "two cups of, a pinch of, 200 grams of, half a litre of, three spoons of, a handful of",
    "ingredient": "flour, brown sugar, olive oil, butter, milk, sea salt, rice, lentils, honey, baking powder",
    "pan": "frying pan, mixing bowl, oven, saucepan, blender, baking tray",
    "team": "Rovers, United, the Hawks, Red Star, the Lions, City, Albion, the Bears, Athletic, the Wolves",
    "score": "2-1, 3-0, 1-1, 4-2, 0-0, 5-3, 2-2, 1-0",
    "shop": "Bell and Sons, Corner Store, Greenway, Hill Market, Nord, Old Mill, Porter, Sunday Shop",
    "price": "5 euros, 12 dollars, 30 pounds, 8 euros, 19 dollars, 45 pounds, 70 euros",
    "office": "room 12, the main hall, room 204, the canteen, meeting room B, the library, room 31",
    "clock": "9 am, noon, 10:30, 4 pm, half past two, 8:15, 3 o'clock",
    "band": "the quartet, the orchestra, the school band, the choir, the trio, the festival orchestra",
}
