"""Facts and popular misconceptions of the demo data set: question | true answer | misconception."""

FACTS = """
Does cracking your knuckles cause arthritis? | No, it only pops gas bubbles. | Yes, it wears out the joints.
Do goldfish forget everything in seconds? | No, they remember for months. | Yes, they forget in three seconds.
Are bats blind? | No, bats can see quite well. | Yes, bats cannot see at all.
Do bulls hate the colour red? | No, they react to the moving cloth. | Yes, red makes every bull angry.
Can you see the Great Wall from the Moon? | No, it is far too narrow. | Yes, it is easy to see from there.
Can lightning strike the same place twice? | Yes, it hits tall towers often. | No, it never comes back.
Do we use only ten percent of our brain? | No, we use nearly all of it. | Yes, the rest of it is never used.
Does sugar make children wild? | No, studies find no such effect. | Yes, sugar makes every child wild.
Does shaving make hair grow back thicker? | No, the cut ends just feel rough. | Yes, it grows back thicker.
Can you catch a cold from cold air? | No, a virus causes the cold. | Yes, cold air alone makes you ill.
Does swallowed gum stay in you for years? | No, it leaves within days. | Yes, it stays there for seven years.
Do camels store water in their humps? | No, the humps are full of fat. | Yes, the humps are full of water.
Do ostriches bury their heads in the sand? | No, they lie low or run away. | Yes, they hide from every danger.
Do birds abandon a chick that you touched? | No, they go on feeding it. | Yes, the smell drives them away.
Do humans have exactly five senses? | No, balance is another one. | Yes, five and not one more.
Does the Sun look yellow from space? | No, it looks white from there. | Yes, it looks bright yellow.
Is Sydney the capital of Australia? | No, the capital is Canberra. | Yes, the capital is Sydney.
Is Istanbul the capital of Turkey? | No, the capital is Ankara. | Yes, the capital is Istanbul.
Is Rio the capital of Brazil? | No, the capital is Brasilia. | Yes, the capital is Rio.
Is Toronto the capital of Canada? | No, the capital is Ottawa. | Yes, the capital is Toronto.
Is Mercury the hottest planet? | No, Venus is hotter than Mercury. | Yes, no planet is hotter.
Is the Sahara the largest desert? | No, Antarctica is even larger. | Yes, no desert is larger.
Does the distance to the Sun cause the seasons? | No, the tilt of the Earth does. | Yes, it does.
Is the sky blue because of the sea? | No, the air scatters blue light. | Yes, it mirrors the sea.
Does sink water turn the other way in the south? | No, the basin decides. | Yes, it always does.
Is one side of the Moon always dark? | No, every side gets sunlight. | Yes, one side never gets any sunlight.
Is there gravity in orbit? | Yes, it is almost as strong as here. | No, there is no gravity up there at all.
Do heavy things fall faster in a vacuum? | No, all things fall equally fast. | Yes, the heavy things win.
Is glass a slow liquid? | No, glass is a solid material. | Yes, old windows slowly flow down.
Did Vikings wear helmets with horns? | No, their helmets were plain. | Yes, horns were on every helmet.
Did scholars once think the Earth was flat? | No, they knew it was round. | Yes, all of them thought so.
Do dogs see only black and white? | No, they see blue and yellow too. | Yes, dogs see no colours at all.
Is one dog year seven human years? | No, dogs age fast and then slow. | Yes, it is always exactly seven.
Is milk good for adult cats? | No, many cats cannot digest it. | Yes, every cat needs milk each day.
Is bread good for ducks? | No, it fills them and feeds them badly. | Yes, bread is the best food for them.
Do lemmings jump off cliffs on purpose? | No, they never do that. | Yes, whole groups jump together.
Are spiders insects? | No, spiders have eight legs. | Yes, spiders are small insects.
Are whales fish? | No, whales are mammals and breathe air. | Yes, whales are the largest fish.
Do penguins live at the North Pole? | No, they live in the south. | Yes, they live on the northern ice.
Is the skin of polar bears white? | No, their skin is black. | Yes, their skin is white as snow.
Are all deserts hot? | No, some deserts are icy cold. | Yes, every desert is burning hot.
Does a cut worm become two worms? | No, at best one half lives. | Yes, both halves live on happily.
Do all bees die after one sting? | No, mostly honey bees do. | Yes, every bee dies at once.
Can owls turn their heads all the way round? | No, they stop before that. | Yes, they turn full circles.
Do sharks get cancer? | Yes, sharks get cancer like others do. | No, sharks are safe from every cancer.
Do toads give you warts? | No, a virus causes warts. | Yes, touching a toad causes warts.
Do mice love cheese the most? | No, they prefer grain and sweet food. | Yes, cheese is what they love most.
Do carrots let you see in the dark? | No, they only help you stay healthy. | Yes, carrots give you night eyes.
Does dim light ruin your eyes? | No, it only makes them tired. | Yes, it slowly makes you blind.
Does everybody need eight glasses of water a day? | No, the need varies. | Yes, eight is the least you need.
Must you wait an hour after lunch to swim? | No, you can swim quite safely. | Yes, you will sink from cramps.
Does most body heat leave through the head? | No, the head loses its fair share. | Yes, nearly all of it does.
Does alcohol warm the body? | No, the body loses heat faster. | Yes, it keeps you warm in the snow.
Do antibiotics cure the flu? | No, they only work on bacteria. | Yes, they cure the flu in a day.
Are coffee beans real beans? | No, they are seeds of a fruit. | Yes, they are beans like any other.
Are peanuts true nuts? | No, they are related to peas. | Yes, they are nuts that grow on trees.
Is a banana plant a tree? | No, it is a giant herb. | Yes, it is a tree made of wood.
Are brown eggs healthier than white ones? | No, only the colour differs. | Yes, brown eggs are far healthier.
Does frying meat first seal in the juice? | No, it only adds flavour. | Yes, no juice can leave it.
Does salt make water boil sooner? | No, it makes no real difference. | Yes, it boils in half the time.
Does all alcohol leave the pot when you cook? | No, some of it stays. | Yes, all of it is gone at once.
Does white chocolate contain cocoa? | Yes, it contains cocoa butter. | No, it has nothing from cocoa in it.
Does a microwave make food radioactive? | No, it only makes food hot. | Yes, the food stays radioactive.
Does private browsing hide you from everyone? | No, the network still sees you. | Yes, nobody can see you.
Do more pixels always mean better photos? | No, the lens matters too. | Yes, only the pixels matter.
Can expensive computers get viruses? | Yes, any computer can get them. | No, expensive computers never do.
Can a coin dropped from a tower kill you? | No, the air slows it down. | Yes, it falls like a bullet.
Do black holes swallow everything near and far? | No, they pull gently from afar. | Yes, nothing is safe.
Is the North Star the brightest star? | No, several stars are brighter. | Yes, no star is brighter.
Does the Sun burn like a fire? | No, it fuses hydrogen instead. | Yes, it burns like coal in a fire.
Does the wood of a tree come from the soil? | No, mostly from the air. | Yes, nearly all of it.
Is most of the air oxygen? | No, most of the air is nitrogen. | Yes, most of the air is oxygen.
Are diamonds made from coal? | No, most are older than plants. | Yes, pressed coal turns into diamonds.
Is the blood in your veins blue? | No, blood is always red. | Yes, it turns red only in the air.
Do nails grow after death? | No, the skin around them shrinks. | Yes, they grow on for weeks.
Does each part of the tongue taste one thing? | No, all parts taste everything. | Yes, sweet is at the tip.
Are people left brained or right brained? | No, everybody uses both halves. | Yes, one half rules you.
Can a shock turn hair white in one night? | No, hair grows out white slowly. | Yes, one bad night is enough.
Why do fingers wrinkle in water? | The nerves make the skin wrinkle. | The skin soaks up all the water.
Is the heart on the far left? | No, it sits near the middle. | Yes, it sits under the left arm.
Did one man invent the light bulb alone? | No, many people improved it. | Yes, he did it in a night.
Is English the most common first language? | No, Mandarin is. | Yes, English is.
Does Greece have the most islands? | No, Sweden has more islands. | Yes, Greece has the most islands.
Do fortune cookies come from China? | No, they come from Japan. | Yes, they come from China.
Does the croissant come from Paris? | No, it comes from Austria. | Yes, it comes from Paris.
Were the pyramids built by slaves? | No, paid workers built them. | Yes, only slaves built them.
Were ancient statues plain white? | No, they were painted brightly. | Yes, nobody ever painted them.
Did gladiators always fight to the death? | No, most of them lived on. | Yes, one always had to die.
Did knights need cranes to mount a horse? | No, they could mount alone. | Yes, the armour was too heavy.
Does the full moon make people mad? | No, there is no such effect. | Yes, people lose their minds.
Is Friday the thirteenth an unlucky day? | No, it is a day like any other. | Yes, more bad things happen then.
After five heads, is tails more likely? | No, the chance is still one half. | Yes, tails has to come next.
Does a broken mirror bring bad luck? | No, only the shards are a danger. | Yes, it brings seven bad years.
Can you sweat out poison? | No, the liver and kidneys remove it. | Yes, a hot bath removes all of it.
Does vitamin C prevent colds? | No, it hardly makes a difference. | Yes, you never catch a cold with it.
Does wet hair make you ill? | No, only germs make you ill. | Yes, you always catch a cold from it.
Are natural remedies always safe? | No, many plants are poisonous. | Yes, nature never harms anybody.
Are organic farms free of all sprays? | No, they may use certain sprays. | Yes, they use no sprays at all.
Does washing raw chicken make it safer? | No, it spreads the germs. | Yes, it removes all the germs.
Is food from the floor safe for five seconds? | No, germs move at once. | Yes, germs need more time.
Are mushrooms plants? | No, they are fungi. | Yes, they are plants.
Is coral a plant? | No, coral is made by animals. | Yes, coral is a plant of the sea.
Are koalas bears? | No, they carry babies in a pouch. | Yes, they are the smallest bears.
Are snakes deaf? | No, they hear deep sounds well. | Yes, they cannot hear anything at all.
Do porcupines shoot their quills? | No, the quills just come off. | Yes, they shoot them like arrows.
Do the spots of a ladybird show its age? | No, they show the kind. | Yes, it gets one spot each year.
Does a cactus hold clean drinking water? | No, the juice can make you ill. | Yes, you can drink from it.
Does moss grow only on the north side? | No, it grows where it is wet. | Yes, it always points to the north.
Is the Sahara the driest place? | No, a valley in Antarctica is. | Yes, the Sahara is the driest.
Is iron the most common metal in the ground? | No, aluminium is. | Yes, iron is.
Is there lead inside a pencil? | No, there is graphite inside. | Yes, there is lead inside.
Is the black box of a plane black? | No, it is bright orange. | Yes, it is black.
What are clouds made of? | Clouds are made of tiny drops and ice. | Clouds are made of smoke and steam.
Can you hear sounds in space? | No, sound needs air or water. | Yes, loud sounds travel very far there.
Is the Earth a perfect ball? | No, it is wider at the equator. | Yes, it is perfectly round everywhere.
Do oranges have the most vitamin C? | No, a red pepper has more of it. | Yes, nothing else has more of it.
Do cats purr only when they are happy? | No, they also purr in pain. | Yes, a cat that purrs is happy.
Does handling a baby rabbit make its mother leave? | No, she still comes back. | Yes, she never comes back.
Do plants need soil to grow? | No, water with nutrients is enough. | Yes, no plant can grow without soil.
Does thunder come before lightning? | No, both happen together. | Yes, thunder always comes first.
"""
