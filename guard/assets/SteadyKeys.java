import java.lang.instrument.Instrumentation;
import java.lang.reflect.Field;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.nio.file.StandardCopyOption;
import java.nio.file.attribute.PosixFilePermissions;
import java.util.Properties;

/**
 * A Java agent that puts kept keys in the place of those that TorchServe makes at every start.
 *
 * TorchServe has no setting for it. The agent's argument is a file of properties: `management`, `inference` and `API`.
 * Compiled with `javac --release 11`; steady_keys.jar holds the result, and a test compares both.
 */
public final class SteadyKeys {
    private static final String TARGET = "org.pytorch.serve.util.TokenAuthorization";
    private static final String[][] FIELDS = {
        {"apiKey", "API"}, {"managementKey", "management"}, {"inferenceKey", "inference"}};

    private SteadyKeys() {}

    public static void premain(String keys, Instrumentation java) {
        Thread thread = new Thread(() -> run(keys, java), "steady-keys");
        thread.setDaemon(true);
        thread.start();
    }

    private static void run(String keys, Instrumentation java) {
        try {
            Properties kept = new Properties();
            kept.load(Files.newBufferedReader(Paths.get(keys)));
            while (true) {
                for (Class<?> known : java.getAllLoadedClasses()) {
                    if (known.getName().equals(TARGET) && put(known, kept)) {
                        return;
                    }
                }
                Thread.sleep(20);
            }
        } catch (Exception error) {
            System.err.println("steady-keys: " + error);
            System.exit(1);
        }
    }

    /** Return whether TorchServe has written its own keys, so that the kept ones are in their place now. */
    private static boolean put(Class<?> target, Properties kept) throws Exception {
        Object path = field(target, "keyFilePath").get(null);
        Path file = path == null ? null : Paths.get((String) path);
        if (file == null || !Files.exists(file)) {
            return false;
        }
        String text = new String(Files.readAllBytes(file), StandardCharsets.UTF_8);
        for (String[] names : FIELDS) {
            Object made = field(target, names[0]).get(null);
            if (made == null || !text.contains((String) made)) {
                return false;
            }
            text = text.replace((String) made, kept.getProperty(names[1]));
        }
        Path whole = Files.createTempFile(
            file.getParent(), ".key_file", "", PosixFilePermissions.asFileAttribute(PosixFilePermissions.fromString("rw-------")));
        Files.write(whole, text.getBytes(StandardCharsets.UTF_8));
        for (String[] names : FIELDS) {
            field(target, names[0]).set(null, kept.getProperty(names[1]));
        }
        Files.move(whole, file, StandardCopyOption.ATOMIC_MOVE, StandardCopyOption.REPLACE_EXISTING);
        return true;
    }

    private static Field field(Class<?> target, String name) throws NoSuchFieldException {
        Field found = target.getDeclaredField(name);
        found.setAccessible(true);
        return found;
    }
}
