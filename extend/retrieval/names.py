"""Simple words that name the facts of a retrieval row."""

_WORDS = """
acorn anchor apple apron arrow atlas badge bagel baker bamboo banjo barn basin basket beach beacon
beaver bench berry bicycle birch blanket boat bonnet book bottle bowl branch bread breeze brick
bridge broom brush bucket buffalo button cabin cactus camel camera candle canoe canyon carpet
carrot castle cedar cellar chair chalk cheese cherry chestnut chimney circle clay cliff cloak clock
cloud clover coast cobra coffee comet compass copper coral cotton cradle crane crayon creek cricket
crown crystal curtain daisy desert diamond dolphin donkey door dragon drum eagle earth elbow elm
ember engine falcon farmer feather fence fern fiddle field finger flame flute forest fossil
fountain fox frog garden garlic gate ginger glacier glove goat granite grape guitar hammer harbor
harvest hazel hedge helmet heron hill honey horse hotel igloo island ivory jacket jaguar jar
jasmine jelly jewel jungle kettle kitchen kite ladder lake lantern lemon leopard lily lion lizard
lobster magnet mango maple marble market meadow melon mirror mitten monkey moon moss mountain
mushroom napkin needle nest notebook nutmeg oak ocean olive onion orange orchard otter owl oyster
paddle palace panda paper parrot peach peanut pearl pebble pencil penguin pepper piano pigeon
pillow pine planet plum pocket pond pony poppy potato prairie pumpkin puppet quarry quilt rabbit
raven reef ribbon river robin rocket root rope rose saddle sail salmon sand sapphire scarf school
shadow shell ship silver snow sparrow spider spoon spruce squirrel stable star stone storm stove
straw sugar summit sunset swan table teapot temple thistle thunder tiger timber tomato torch tower
tractor train tulip tunnel turtle umbrella valley velvet village violin walnut wagon water weasel
whale wheat willow window winter wolf wood wool yard zebra
"""

NAMES: tuple[str, ...] = tuple(_WORDS.split())
